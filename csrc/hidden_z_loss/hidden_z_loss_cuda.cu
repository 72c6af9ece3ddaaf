// hidden_z_loss on CUDA: launch and registration.
#include "common/launch.h"
#include "common/library.h"
#include "hidden_z_loss/hidden_z_loss.h"
#include "hidden_z_loss/hidden_z_loss_kernel.cuh"

namespace mmoe {
namespace {

namespace device = hidden_z_loss;

unsigned blocks(int64_t tokens) {
  return static_cast<unsigned>((tokens + device::kTokensPerBlock - 1) / device::kTokensPerBlock);
}

HiddenZLoss hidden_z_loss_cuda(Tensor z_any, std::optional<Tensor> valid_any, double coefficient) {
  check_hidden_z_loss(z_any, valid_any);
  const DeviceScope scope(z_any);
  const Tensor z = torch::stable::contiguous(z_any);
  std::optional<Tensor> valid;
  if (valid_any) valid = torch::stable::contiguous(*valid_any);
  const int64_t tokens = z.size(0), width = z.size(1);
  Tensor loss = torch::stable::new_empty(z, {}, ScalarType::Float);
  Tensor count = torch::stable::new_empty(z, {}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(z, {tokens}, ScalarType::Float);
  const bool* counts = valid ? valid->const_data_ptr<bool>() : nullptr;
  float* to = lse.mutable_data_ptr<float>();
  if (tokens > 0) {
    for_device_type(z.scalar_type(), "hidden_z_loss: z", [&](auto type) {
      using T = decltype(type);
      const auto launch = [&](auto vectors) {
        MMOE_LAUNCH((device::lse_kernel<T, vectors>), blocks(tokens), device::kThreads, 0, scope.stream())
        (static_cast<const PieceOf<T, vectors>*>(z.const_data_ptr()), counts, tokens, width / kPiece<T, vectors>, to);
        check_launch("hidden_z_loss: lse_kernel");
      };
      if (rows_on_grid<T>(width, z.const_data_ptr())) {
        launch(std::true_type{});
      } else {
        launch(std::false_type{});
      }
    });
  }
  MMOE_LAUNCH(device::mean_kernel, 1, device::kSumThreads, 0, scope.stream())
  (to, counts, tokens, static_cast<float>(coefficient), loss.mutable_data_ptr<float>(),
   count.mutable_data_ptr<float>());
  check_launch("hidden_z_loss: mean_kernel");
  return {loss, lse, count};
}

Tensor hidden_z_loss_backward_cuda(Tensor grad_loss, Tensor z_any, Tensor lse_any, Tensor count, double coefficient) {
  check_hidden_z_loss_backward(grad_loss, z_any, lse_any, count);
  const DeviceScope scope(z_any);
  const Tensor z = torch::stable::contiguous(z_any), lse = torch::stable::contiguous(lse_any);
  const int64_t tokens = z.size(0), width = z.size(1);
  Tensor grad_z = torch::stable::new_empty(z, {tokens, width});
  if (tokens == 0) return grad_z;
  for_device_type(z.scalar_type(), "hidden_z_loss: z", [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto vectors) {
      using Piece = PieceOf<T, vectors>;
      MMOE_LAUNCH((device::backward_kernel<T, vectors>), blocks(tokens), device::kThreads, 0, scope.stream())
      (grad_loss.const_data_ptr<float>(), static_cast<const Piece*>(z.const_data_ptr()), lse.const_data_ptr<float>(),
       count.const_data_ptr<float>(), static_cast<float>(coefficient), tokens, width / kPiece<T, vectors>,
       static_cast<Piece*>(grad_z.mutable_data_ptr()));
      check_launch("hidden_z_loss: backward_kernel");
    };
    if (rows_on_grid<T>(width, z.const_data_ptr(), grad_z.const_data_ptr())) {
      launch(std::true_type{});
    } else {
      launch(std::false_type{});
    }
  });
  return grad_z;
}

}  // namespace

MMOE_CUDA(m) {
  m.impl("hidden_z_loss", TORCH_BOX(&hidden_z_loss_cuda));
  m.impl("hidden_z_loss_backward", TORCH_BOX(&hidden_z_loss_backward_cuda));
}

}  // namespace mmoe
