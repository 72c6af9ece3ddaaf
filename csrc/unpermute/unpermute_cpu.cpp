// unpermute on the CPU: tokens in parallel on torch's threads.
#include "unpermute/unpermute_cpu.h"

#include "common/library.h"
#include "unpermute/unpermute.h"

namespace mmoe {
namespace {

Tensor unpermute_cpu(Tensor rows_any, Tensor row_of_slot_any, Tensor weights_any, Tensor x_any, Tensor identity_any,
                     std::optional<Tensor> slot_of_row) {
  check_unpermute(rows_any, row_of_slot_any, weights_any, x_any, identity_any, slot_of_row);
  const Tensor rows = torch::stable::contiguous(rows_any), row_of_slot = torch::stable::contiguous(row_of_slot_any);
  const Tensor weights = torch::stable::contiguous(weights_any), x = torch::stable::contiguous(x_any);
  const Tensor identity = torch::stable::contiguous(identity_any);
  check_rows_inside("unpermute", row_of_slot, rows.size(0));
  const int64_t tokens = x.size(0), top_k = row_of_slot.size(1), width = x.size(1);
  Tensor out = torch::stable::new_empty(x, {tokens, width});
  for_cpu_type(unpermute_kernels(), x.scalar_type(), "unpermute: x", [&](const auto& kernels, auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const int32_t* places = row_of_slot.const_data_ptr<int32_t>();
    const T *r = rows.const_data_ptr<T>(), *tokens_in = x.const_data_ptr<T>();
    const C *w = weights.const_data_ptr<C>(), *i = identity.const_data_ptr<C>();
    T* to = out.mutable_data_ptr<T>();
    const int64_t grain = items_per_task(width * (top_k + 2) * static_cast<int64_t>(sizeof(T)));
    torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
      kernels.forward(r, places, w, tokens_in, i, to, top_k, width, begin, end);
    });
  });
  return out;
}

UnpermuteGrads unpermute_backward_cpu(Tensor grad_out_any, Tensor rows_any, Tensor row_of_slot_any, Tensor weights_any,
                                      Tensor x_any, Tensor identity_any, std::optional<Tensor> slot_of_row) {
  check_unpermute(rows_any, row_of_slot_any, weights_any, x_any, identity_any, slot_of_row);
  check_unpermute_grad(grad_out_any, x_any);
  const Tensor grad_out = torch::stable::contiguous(grad_out_any), rows = torch::stable::contiguous(rows_any);
  const Tensor row_of_slot = torch::stable::contiguous(row_of_slot_any);
  const Tensor weights = torch::stable::contiguous(weights_any), x = torch::stable::contiguous(x_any);
  const Tensor identity = torch::stable::contiguous(identity_any);
  check_rows_inside("unpermute", row_of_slot, rows.size(0));
  const int64_t tokens = x.size(0), top_k = row_of_slot.size(1), width = x.size(1), count = rows.size(0);
  Tensor grad_rows =
      slot_of_row ? torch::stable::new_empty(rows, {count, width}) : torch::stable::new_zeros(rows, {count, width});
  Tensor grad_weights = torch::stable::new_empty(weights, {tokens, top_k});
  Tensor grad_x = torch::stable::new_empty(x, {tokens, width});
  Tensor grad_identity = torch::stable::new_empty(identity, {tokens});
  for_cpu_type(unpermute_kernels(), x.scalar_type(), "unpermute: x", [&](const auto& kernels, auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
    const int32_t* places = row_of_slot.const_data_ptr<int32_t>();
    const T *g = grad_out.const_data_ptr<T>(), *r = rows.const_data_ptr<T>(), *tokens_in = x.const_data_ptr<T>();
    const C *w = weights.const_data_ptr<C>(), *i = identity.const_data_ptr<C>();
    T *to_rows = grad_rows.mutable_data_ptr<T>(), *to_x = grad_x.mutable_data_ptr<T>();
    C *to_weights = grad_weights.mutable_data_ptr<C>(), *to_identity = grad_identity.mutable_data_ptr<C>();
    const bool stream = streams(to_rows, count, row_bytes);
    torch::stable::parallel_for(0, tokens, items_per_task(row_bytes * (2 * top_k + 3)),
                                [&](int64_t begin, int64_t end) {
                                  kernels.backward(g, r, places, w, tokens_in, i, to_rows, to_weights, to_x,
                                                   to_identity, top_k, width, stream, begin, end);
                                });
    if (slot_of_row) pad_rows(torch::stable::contiguous(*slot_of_row), to_rows, row_bytes);
  });
  return {grad_rows, grad_weights, grad_x, grad_identity};
}

}  // namespace

MMOE_CPU(m) {
  m.impl("unpermute", TORCH_BOX(&unpermute_cpu));
  m.impl("unpermute_backward", TORCH_BOX(&unpermute_backward_cpu));
}

}  // namespace mmoe
