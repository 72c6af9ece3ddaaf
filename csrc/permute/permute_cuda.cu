// permute and permute_fp8 on CUDA: launch and registration. The gradient is unpermute's sum with weights of 1.
#include <tuple>

#include "common/library.h"
#include "permute/permute.h"
#include "permute/permute_fp8_kernel.cuh"
#include "permute/permute_kernel.cuh"
#include "unpermute/unpermute_launch.h"

namespace mmoe {
namespace {

template <typename Piece>
void launch_copy(cudaStream_t stream, const Tensor& x, const Tensor& row_of_slot, const Tensor& slot_of_row,
                 int64_t pieces, Tensor& rows) {
  const unsigned blocks = static_cast<unsigned>(x.size(0)) + pad_blocks(slot_of_row.size(0));
  if (blocks == 0) return;
  MMOE_LAUNCH(permute::copy_kernel<Piece>, blocks, row_threads(pieces, permute::kHeld), 0, stream)
  (static_cast<const Piece*>(x.const_data_ptr()), row_of_slot.const_data_ptr<int32_t>(),
   slot_of_row.const_data_ptr<int32_t>(), static_cast<int>(x.size(0)), static_cast<int>(slot_of_row.size(0)),
   static_cast<int>(row_of_slot.size(1)), static_cast<int>(pieces), static_cast<Piece*>(rows.mutable_data_ptr()));
  check_launch("permute: copy_kernel");
}

Tensor permute_cuda(Tensor x_any, Tensor row_of_slot_any, Tensor slot_of_row_any) {
  check_permute("permute", x_any, row_of_slot_any, slot_of_row_any);
  const DeviceScope scope(x_any);
  const Tensor x = torch::stable::contiguous(x_any), row_of_slot = torch::stable::contiguous(row_of_slot_any);
  const Tensor slot_of_row = torch::stable::contiguous(slot_of_row_any);
  const int64_t width = x.size(1);
  Tensor rows = torch::stable::new_empty(x, {slot_of_row.size(0), width});
  for_device_type(x.scalar_type(), "permute: x", [&](auto type) {
    using T = decltype(type);
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    if (rows_on_grid<T>(width, x.const_data_ptr(), rows.const_data_ptr())) {
      launch_copy<uint4>(scope.stream(), x, row_of_slot, slot_of_row, width / kVector<T>, rows);
    } else {
      launch_copy<Bits>(scope.stream(), x, row_of_slot, slot_of_row, width, rows);
    }
  });
  return rows;
}

Tensor permute_backward_cuda(Tensor grad_rows, Tensor row_of_slot) {
  check_permute_backward(grad_rows, row_of_slot);
  return sum_rows("permute: grad_rows", torch::stable::contiguous(grad_rows), torch::stable::contiguous(row_of_slot),
                  nullptr);
}

std::tuple<Tensor, Tensor> permute_fp8_cuda(Tensor x_any, Tensor row_of_slot_any, Tensor slot_of_row_any) {
  check_permute("permute_fp8", x_any, row_of_slot_any, slot_of_row_any);
  check(x_any.size(1) % kFp8Block == 0, "permute_fp8: x must be [T, d] with d a multiple of ", kFp8Block);
  const DeviceScope scope(x_any);
  const Tensor x = torch::stable::contiguous(x_any), row_of_slot = torch::stable::contiguous(row_of_slot_any);
  const Tensor slot_of_row = torch::stable::contiguous(slot_of_row_any);
  const int64_t tokens = x.size(0), width = x.size(1), count = slot_of_row.size(0);
  Tensor rows = torch::stable::new_empty(x, {count, width}, ScalarType::Float8_e4m3fn);
  Tensor scales = torch::stable::new_empty(x, {count, width / kFp8Block}, ScalarType::Float);
  const unsigned blocks = static_cast<unsigned>(tokens) + pad_blocks(count);
  if (blocks == 0 || width == 0) return {rows, scales};
  for_device_type(x.scalar_type(), "permute_fp8: x", [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    auto* kernel = rows_on_grid<T>(width, from) ? permute::fp8_kernel<T, true> : permute::fp8_kernel<T, false>;
    const size_t shared_bytes = width / kFp8Block * sizeof(float);
    MMOE_LAUNCH(kernel, blocks, row_threads(width / kVector<T>, permute::kFp8Held), shared_bytes, scope.stream())
    (from, row_of_slot.const_data_ptr<int32_t>(), slot_of_row.const_data_ptr<int32_t>(), static_cast<int>(tokens),
     static_cast<int>(count), static_cast<int>(row_of_slot.size(1)), static_cast<int>(width),
     static_cast<unsigned char*>(rows.mutable_data_ptr()), scales.mutable_data_ptr<float>());
    check_launch("permute_fp8: fp8_kernel");
  });
  return {rows, scales};
}

}  // namespace

MMOE_CUDA(m) {
  m.impl("permute", TORCH_BOX(&permute_cuda));
  m.impl("permute_backward", TORCH_BOX(&permute_backward_cuda));
  m.impl("permute_fp8", TORCH_BOX(&permute_fp8_cuda));
}

}  // namespace mmoe
