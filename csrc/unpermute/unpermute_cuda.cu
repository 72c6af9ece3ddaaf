// unpermute on CUDA: launch and registration.
#include "common/library.h"
#include "unpermute/unpermute.h"
#include "unpermute/unpermute_kernel.cuh"
#include "unpermute/unpermute_launch.h"

namespace mmoe {

Tensor sum_rows(const char* what, const Tensor& rows, const Tensor& row_of_slot, const Mix* mix) {
  const DeviceScope scope(rows);
  const int64_t tokens = row_of_slot.size(0), width = rows.size(1);
  Tensor out = torch::stable::new_empty(rows, {tokens, width});
  const void* x = mix != nullptr ? mix->x.const_data_ptr() : nullptr;
  for_device_type(rows.scalar_type(), what, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto vectors) {
      using Piece = PieceOf<T, vectors>;
      const int64_t pieces = width / kPiece<T, vectors>;
      if (tokens == 0 || pieces == 0) return;
      MMOE_LAUNCH((unpermute::forward_kernel<T, vectors>), static_cast<unsigned>(tokens),
                  row_threads(pieces, unpermute::kHeld), 0, scope.stream())
      (static_cast<const Piece*>(rows.const_data_ptr()), row_of_slot.const_data_ptr<int32_t>(),
       mix != nullptr ? mix->weights.const_data_ptr<float>() : nullptr, static_cast<const Piece*>(x),
       mix != nullptr ? mix->identity.const_data_ptr<float>() : nullptr, static_cast<int>(rows.size(0)),
       static_cast<int>(row_of_slot.size(1)), static_cast<int>(pieces), static_cast<Piece*>(out.mutable_data_ptr()));
      check_launch(what);
    };
    if (rows_on_grid<T>(width, rows.const_data_ptr(), x, out.const_data_ptr())) {
      launch(std::true_type{});
    } else {
      launch(std::false_type{});
    }
  });
  return out;
}

namespace {

Tensor unpermute_cuda(Tensor rows, Tensor row_of_slot, Tensor weights, Tensor x, Tensor identity,
                      std::optional<Tensor> slot_of_row) {
  check_unpermute(rows, row_of_slot, weights, x, identity, slot_of_row);
  const Mix mix{torch::stable::contiguous(weights), torch::stable::contiguous(x), torch::stable::contiguous(identity)};
  return sum_rows("unpermute: rows", torch::stable::contiguous(rows), torch::stable::contiguous(row_of_slot), &mix);
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
  Tensor grad_rows =
      slot_of_row ? torch::stable::new_empty(rows, {count, width}) : torch::stable::new_zeros(rows, {count, width});
  Tensor grad_weights = torch::stable::new_empty(weights, {tokens, top_k});
  Tensor grad_x = torch::stable::new_empty(x, {tokens, width});
  Tensor grad_identity = torch::stable::new_empty(identity, {tokens});
  const void *g = grad_out.const_data_ptr(), *r = rows.const_data_ptr(), *token = x.const_data_ptr();
  void *to_rows = grad_rows.mutable_data_ptr(), *to_x = grad_x.mutable_data_ptr();
  for_device_type(x.scalar_type(), "unpermute: x", [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto vectors) {
      using Piece = PieceOf<T, vectors>;
      const int64_t pieces = width / kPiece<T, vectors>;
      const int threads = row_threads(pieces, unpermute::kHeld);
      const int64_t shared_bytes = threads / kWarp * (top_k + 1) * static_cast<int64_t>(sizeof(float));
      check(shared_bytes <= kSharedByDefault, "unpermute: k = ", top_k, " is more than CUDA takes at d = ", width);
      const unsigned blocks = static_cast<unsigned>(tokens) + (slot_of_row ? pad_blocks(count) : 0);
      if (blocks == 0) return;
      MMOE_LAUNCH((unpermute::backward_kernel<T, vectors>), blocks, threads, shared_bytes, scope.stream())
      (static_cast<const Piece*>(g), static_cast<const Piece*>(r), row_of_slot.const_data_ptr<int32_t>(),
       weights.const_data_ptr<float>(), static_cast<const Piece*>(token), identity.const_data_ptr<float>(),
       slot_of_row ? slot_of_row->const_data_ptr<int32_t>() : nullptr, static_cast<int>(tokens),
       static_cast<int>(count), static_cast<int>(top_k), static_cast<int>(pieces), static_cast<Piece*>(to_rows),
       grad_weights.mutable_data_ptr<float>(), static_cast<Piece*>(to_x), grad_identity.mutable_data_ptr<float>());
      check_launch("unpermute: backward_kernel");
    };
    if (rows_on_grid<T>(width, g, r, token, to_rows, to_x)) {
      launch(std::true_type{});
    } else {
      launch(std::false_type{});
    }
  });
  return {grad_rows, grad_weights, grad_x, grad_identity};
}

}  // namespace

MMOE_CUDA(m) {
  m.impl("unpermute", TORCH_BOX(&unpermute_cuda));
  m.impl("unpermute_backward", TORCH_BOX(&unpermute_backward_cuda));
}

}  // namespace mmoe
