// unpermute on CUDA: launch and registration.
#include "common/library.h"
#include "unpermute/unpermute.h"
#include "unpermute/unpermute_launch.h"

namespace mmoe {
namespace {

constexpr int64_t kMaxSharedBytes = 48 * 1024;

Tensor unpermute_cuda(Tensor rows_any, Tensor row_of_slot_any, Tensor weights_any, Tensor x_any, Tensor identity_any,
                      std::optional<Tensor> slot_of_row) {
  check_unpermute(rows_any, row_of_slot_any, weights_any, x_any, identity_any, slot_of_row);
  const DeviceScope scope(x_any);
  const Tensor rows = torch::stable::contiguous(rows_any), row_of_slot = torch::stable::contiguous(row_of_slot_any);
  const Tensor weights = torch::stable::contiguous(weights_any), x = torch::stable::contiguous(x_any);
  const Tensor identity = torch::stable::contiguous(identity_any);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  for_device_type(x.scalar_type(), "unpermute: x", [&](auto type) {
    using T = decltype(type);
    launch_sum("unpermute: forward_kernel", scope.stream(), static_cast<const T*>(rows.const_data_ptr()),
               row_of_slot.const_data_ptr<int32_t>(), weights.const_data_ptr<float>(),
               static_cast<const T*>(x.const_data_ptr()), identity.const_data_ptr<float>(), rows.size(0), x.size(0),
               row_of_slot.size(1), x.size(1), static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

UnpermuteGrads unpermute_backward_cuda(Tensor grad_out_any, Tensor rows_any, Tensor row_of_slot_any, Tensor weights_any,
                                       Tensor x_any, Tensor identity_any, std::optional<Tensor> slot_of_row_any) {
  check_unpermute(rows_any, row_of_slot_any, weights_any, x_any, identity_any, slot_of_row_any);
  check_unpermute_grad(grad_out_any, x_any);
  const DeviceScope scope(x_any);
  const Tensor grad_out = torch::stable::contiguous(grad_out_any), rows = torch::stable::contiguous(rows_any);
  const Tensor row_of_slot = torch::stable::contiguous(row_of_slot_any);
  const Tensor weights = torch::stable::contiguous(weights_any), x = torch::stable::contiguous(x_any);
  const Tensor identity = torch::stable::contiguous(identity_any);
  std::optional<Tensor> slot_of_row;
  if (slot_of_row_any) slot_of_row = torch::stable::contiguous(*slot_of_row_any);
  const int64_t tokens = x.size(0), top_k = row_of_slot.size(1), width = x.size(1), count = rows.size(0);
  Tensor grad_rows = torch::stable::new_empty(rows, {count, width});
  Tensor grad_weights = torch::stable::new_empty(weights, {tokens, top_k});
  Tensor grad_x = torch::stable::new_empty(x, {tokens, width});
  Tensor grad_identity = torch::stable::new_empty(identity, {tokens});
  for_device_type(x.scalar_type(), "unpermute: x", [&](auto type) {
    using T = decltype(type);
    const auto* g = static_cast<const T*>(grad_out.const_data_ptr());
    const auto* r = static_cast<const T*>(rows.const_data_ptr());
    const auto* token = static_cast<const T*>(x.const_data_ptr());
    auto* to_rows = static_cast<T*>(grad_rows.mutable_data_ptr());
    auto* to_x = static_cast<T*>(grad_x.mutable_data_ptr());
    const bool vectors = rows_on_grid<T>(width, g, r, token, to_rows, to_x);
    const int64_t pieces = vectors ? width / kVector<T> : width;
    const int threads = row_threads(pieces, unpermute::kHeld);
    const int64_t shared_bytes = threads / kWarp * (top_k + 1) * static_cast<int64_t>(sizeof(float));
    check(shared_bytes <= kMaxSharedBytes, "unpermute: k = ", top_k, " is more than CUDA takes at d = ", width);
    const unsigned blocks = static_cast<unsigned>(tokens) + (slot_of_row ? pad_blocks(count) : 0);
    if (blocks == 0) return;
    auto* kernel = vectors ? unpermute::backward_kernel<T, true> : unpermute::backward_kernel<T, false>;
    MMOE_LAUNCH(kernel, blocks, threads, shared_bytes, scope.stream())
    (g, r, row_of_slot.const_data_ptr<int32_t>(), weights.const_data_ptr<float>(), token,
     identity.const_data_ptr<float>(), slot_of_row ? slot_of_row->const_data_ptr<int32_t>() : nullptr,
     static_cast<int>(tokens), static_cast<int>(count), static_cast<int>(top_k), static_cast<int>(pieces), to_rows,
     grad_weights.mutable_data_ptr<float>(), to_x, grad_identity.mutable_data_ptr<float>());
    check_launch("unpermute: backward_kernel");
  });
  return {grad_rows, grad_weights, grad_x, grad_identity};
}

}  // namespace

MMOE_CUDA(m) {
  m.impl("unpermute", TORCH_BOX(&unpermute_cuda));
  m.impl("unpermute_backward", TORCH_BOX(&unpermute_backward_cuda));
}

}  // namespace mmoe
