// hidden_z_loss on the CPU: tokens in parallel on torch's threads, the mean summed in token order in float64.
#include "common/cpu_types.h"
#include "common/library.h"
#include "hidden_z_loss/hidden_z_loss.h"
#include "hidden_z_loss/hidden_z_loss_simd.h"

namespace mmoe {
namespace {

constexpr int64_t kElementsPerTask = 1 << 16;

HiddenZLoss hidden_z_loss_cpu(Tensor z_any, std::optional<Tensor> valid_any, double coefficient) {
  check_hidden_z_loss(z_any, valid_any);
  const Tensor z = torch::stable::contiguous(z_any);
  std::optional<Tensor> valid;
  if (valid_any) valid = torch::stable::contiguous(*valid_any);
  const int64_t tokens = z.size(0), width = z.size(1);
  const ScalarType type = sum_type(z.scalar_type());
  Tensor loss = torch::stable::new_empty(z, {}, type), count = torch::stable::new_empty(z, {}, type);
  Tensor lse = torch::stable::new_empty(z, {tokens}, type);
  const bool* counts = valid ? valid->const_data_ptr<bool>() : nullptr;
  for_cpu_type(hidden_z_loss_kernels(), z.scalar_type(), "hidden_z_loss: z", [&](const auto& kernels, auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const T* from = z.const_data_ptr<T>();
    C* to = lse.mutable_data_ptr<C>();
    torch::stable::parallel_for(0, tokens, 1 + kElementsPerTask / width, [&](int64_t begin, int64_t end) {
      kernels.forward(from, counts, to, width, begin, end);
    });
    double total = 0, counted = 0;
    for (int64_t token = 0; token < tokens; ++token) {
      total += static_cast<double>(to[token]) * to[token];
      counted += counts == nullptr || counts[token];
    }
    *loss.mutable_data_ptr<C>() = static_cast<C>(counted > 0 ? coefficient * total / counted : 0.0);
    *count.mutable_data_ptr<C>() = static_cast<C>(counted);
  });
  return {loss, lse, count};
}

Tensor hidden_z_loss_backward_cpu(Tensor grad_loss, Tensor z_any, Tensor lse_any, Tensor count, double coefficient) {
  check_hidden_z_loss_backward(grad_loss, z_any, lse_any, count);
  const Tensor z = torch::stable::contiguous(z_any), lse = torch::stable::contiguous(lse_any);
  const int64_t tokens = z.size(0), width = z.size(1);
  Tensor grad_z = torch::stable::new_empty(z, {tokens, width});
  for_cpu_type(hidden_z_loss_kernels(), z.scalar_type(), "hidden_z_loss: z", [&](const auto& kernels, auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const C counted = *count.const_data_ptr<C>();
    const C factor = counted > 0 ? *grad_loss.const_data_ptr<C>() * static_cast<C>(2 * coefficient) / counted : C(0);
    const T* from = z.const_data_ptr<T>();
    const C* rows = lse.const_data_ptr<C>();
    T* to = grad_z.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, tokens, 1 + kElementsPerTask / width, [&](int64_t begin, int64_t end) {
      kernels.backward(from, rows, factor, to, width, begin, end);
    });
  });
  return grad_z;
}

}  // namespace

MMOE_CPU(m) {
  m.impl("hidden_z_loss", TORCH_BOX(&hidden_z_loss_cpu));
  m.impl("hidden_z_loss_backward", TORCH_BOX(&hidden_z_loss_backward_cpu));
}

}  // namespace mmoe
