// The schema of every operator. Implementations register themselves, a device each, in <operator>_cpu.cpp and
// <operator>_cuda.cu; shapes and errors are in <operator>.h, fake kernels and autograd in mmoe/ops/<operator>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mmoe, m) {
  m.def("permute_index(Tensor ids, int experts) -> (Tensor row_of_slot, Tensor slot_of_row, Tensor offsets)");
}
