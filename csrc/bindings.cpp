// The schema of every operator. Implementations register themselves, a device each, in <operator>_cpu.cpp and
// <operator>_cuda.cu; shapes and errors are in <operator>.h, fake kernels and autograd in mmoe/ops/<operator>.py.
#include "common/library.h"

MMOE_OPERATORS(m) {
  m.def(
      "permute_index(Tensor ids, int experts, int align=1, int? max_rows=None) -> (Tensor row_of_slot, Tensor "
      "slot_of_row, Tensor offsets)");
  m.def("permute(Tensor x, Tensor row_of_slot, Tensor slot_of_row) -> Tensor rows");
  m.def("permute_backward(Tensor grad_rows, Tensor row_of_slot) -> Tensor grad_x");
  m.def("permute_fp8(Tensor x, Tensor row_of_slot, Tensor slot_of_row) -> (Tensor rows, Tensor scales)");
  m.def(
      "unpermute(Tensor rows, Tensor row_of_slot, Tensor weights, Tensor x, Tensor identity, Tensor? slot_of_row) -> "
      "Tensor out");
  m.def(
      "unpermute_backward(Tensor grad_out, Tensor rows, Tensor row_of_slot, Tensor weights, Tensor x, Tensor identity, "
      "Tensor? slot_of_row) -> (Tensor grad_rows, Tensor grad_weights, Tensor grad_x, Tensor grad_identity)");
  m.def("grouped_linear(Tensor rows, Tensor weight, Tensor ends, bool into_main_grad=False) -> Tensor out");
  m.def("grouped_linear_grad_rows(Tensor grad_out, Tensor rows, Tensor weight, Tensor ends) -> Tensor grad_rows");
  m.def("grouped_linear_grad_weight(Tensor grad_out, Tensor rows, Tensor weight, Tensor ends) -> Tensor grad_weight");
  m.def("grouped_linear_add_grad_weight(Tensor(a!) into, Tensor grad_out, Tensor rows, Tensor ends) -> ()");
  m.def("hidden_z_loss(Tensor z, Tensor? valid, float coefficient) -> (Tensor loss, Tensor lse, Tensor count)");
  m.def(
      "hidden_z_loss_backward(Tensor grad_loss, Tensor z, Tensor lse, Tensor count, float coefficient) -> Tensor "
      "grad_z");
  m.def(
      "sva(Tensor q, Tensor[] keys, Tensor[] values, Tensor[] features, Tensor[] positions, Tensor[] absorbed, "
      "Tensor[] constants, Tensor[] masks, float eps) -> (Tensor out, Tensor lse, Tensor[] pooled, Tensor[] mass)");
  m.def(
      "sva_backward(Tensor grad_out, Tensor[] grad_pooled, Tensor[] grad_mass, Tensor q, Tensor[] keys, "
      "Tensor[] values, Tensor[] features, Tensor[] positions, Tensor[] absorbed, Tensor[] constants, "
      "Tensor[] masks, Tensor lse, float eps) -> (Tensor grad_q, Tensor[] grad_keys, Tensor[] grad_values, "
      "Tensor[] grad_features, Tensor[] grad_absorbed, Tensor[] grad_constants, Tensor[] pooled, Tensor[] mass)");
  m.def(
      "router(Tensor logits, Tensor bias, Tensor? valid, int zero_experts, int top_k, float scaling, str score, "
      "bool renormalize, int balance_groups, int selection_groups, int selected_groups, str identity) -> "
      "(Tensor weights, Tensor identity_weight, Tensor group_probs, Tensor stats, Tensor ids, Tensor counts)");
  m.def(
      "router_backward(Tensor? grad_weights, Tensor? grad_identity, Tensor? grad_group_probs, Tensor logits, "
      "Tensor? valid, Tensor ids, Tensor stats, int zero_experts, float scaling, str score, bool renormalize, "
      "int balance_groups, str identity) -> Tensor grad_logits");
}
