// The schema of every operator. Implementations register themselves, a device each, in <operator>_cpu.cpp and
// <operator>_cuda.cu; shapes and errors are in <operator>.h, fake kernels and autograd in mmoe/ops/<operator>.py.
#include "common/library.h"

MMOE_OPERATORS(m) {
  m.def("permute_index(Tensor ids, int experts) -> (Tensor row_of_slot, Tensor slot_of_row, Tensor offsets)");
  m.def("hidden_z_loss(Tensor z, Tensor? valid, float coefficient) -> (Tensor loss, Tensor lse, Tensor count)");
  m.def(
      "hidden_z_loss_backward(Tensor grad_loss, Tensor z, Tensor lse, Tensor count, float coefficient) -> Tensor "
      "grad_z");
}
