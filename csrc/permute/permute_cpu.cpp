// permute on the CPU: tokens in parallel on torch's threads. The gradient is unpermute's sum with weights of 1.
#include "common/library.h"
#include "permute/permute.h"
#include "unpermute/unpermute_cpu.h"

namespace mmoe {
namespace {

Tensor permute_cpu(Tensor x_any, Tensor row_of_slot_any, Tensor slot_of_row_any) {
  check_permute("permute", x_any, row_of_slot_any, slot_of_row_any);
  const Tensor x = torch::stable::contiguous(x_any), row_of_slot = torch::stable::contiguous(row_of_slot_any);
  const Tensor slot_of_row = torch::stable::contiguous(slot_of_row_any);
  const int64_t tokens = x.size(0), top_k = row_of_slot.size(1), count = slot_of_row.size(0);
  check_rows_inside("permute", row_of_slot, count);
  Tensor rows = torch::stable::new_empty(x, {count, x.size(1)});
  for_cpu_type(unpermute_kernels(), x.scalar_type(), "permute: x", [&](const auto&, auto t, auto) {
    const int64_t row_bytes = x.size(1) * static_cast<int64_t>(sizeof(t));
    const char* from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(rows.mutable_data_ptr());
    const int32_t* places = row_of_slot.const_data_ptr<int32_t>();
    const bool stream = streams(to, count, row_bytes);
    torch::stable::parallel_for(0, tokens, items_per_task(row_bytes * top_k), [&](int64_t begin, int64_t end) {
      permute_kernels().copy(from, places, to, top_k, row_bytes, stream, begin, end);
    });
    pad_rows(slot_of_row, to, row_bytes);
  });
  return rows;
}

Tensor permute_backward_cpu(Tensor grad_rows_any, Tensor row_of_slot_any) {
  check_permute_backward(grad_rows_any, row_of_slot_any);
  const Tensor grad_rows = torch::stable::contiguous(grad_rows_any);
  const Tensor row_of_slot = torch::stable::contiguous(row_of_slot_any);
  const int64_t tokens = row_of_slot.size(0), top_k = row_of_slot.size(1), width = grad_rows.size(1);
  check_rows_inside("permute", row_of_slot, grad_rows.size(0));
  Tensor grad_x = torch::stable::new_empty(grad_rows, {tokens, width});
  for_cpu_type(unpermute_kernels(), grad_rows.scalar_type(), "permute: grad_rows",
               [&](const auto& kernels, auto t, auto) {
                 using T = decltype(t);
                 const T* from = grad_rows.const_data_ptr<T>();
                 T* to = grad_x.mutable_data_ptr<T>();
                 const int32_t* places = row_of_slot.const_data_ptr<int32_t>();
                 const int64_t grain = items_per_task(width * top_k * static_cast<int64_t>(sizeof(T)));
                 torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
                   kernels.forward(from, places, nullptr, nullptr, nullptr, to, top_k, width, begin, end);
                 });
               });
  return grad_x;
}

}  // namespace

MMOE_CPU(m) {
  m.impl("permute", TORCH_BOX(&permute_cpu));
  m.impl("permute_backward", TORCH_BOX(&permute_backward_cpu));
}

}  // namespace mmoe
