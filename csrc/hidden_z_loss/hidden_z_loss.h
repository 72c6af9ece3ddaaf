// hidden_z_loss: coefficient * mean over tokens of (log sum_i exp|z_i|)^2, LongCat-Flash's penalty on large
// activations.
//
//   z     [T, d] contiguous, float32, bfloat16 (float64 on the CPU, float16 on CUDA); d >= 1
//   valid [T] bool or none: a False token (padding) is left out of the mean and takes no gradient
// ->
//   loss  scalar, float32 (float64 for float64): 0 where no token counts
//   lse   [T], dtype of loss: log sum_i exp|z_i|, 0 for a token that is left out
//   count scalar, dtype of loss: the tokens that count
// backward: grad_z_ti = grad_loss * coefficient * 2 / count * lse_t * sign(z_ti) * exp(|z_ti| - lse_t), dtype of z.
//
// RuntimeError: naming the argument of another shape or dtype.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "common/arguments.h"

namespace mmoe {

using HiddenZLoss = std::tuple<Tensor, Tensor, Tensor>;

inline void check_hidden_z_loss(const Tensor& z, const std::optional<Tensor>& valid) {
  check(z.dim() == 2 && z.size(1) >= 1, "hidden_z_loss: z must be [T, d] with d >= 1");
  check_tensor("hidden_z_loss", valid, ScalarType::Bool, {z.size(0)}, "valid");
}

inline void check_hidden_z_loss_backward(const Tensor& grad_loss, const Tensor& z, const Tensor& lse,
                                         const Tensor& count) {
  check_hidden_z_loss(z, std::nullopt);
  const ScalarType sums = sum_type(z.scalar_type());
  check_tensor("hidden_z_loss", grad_loss, sums, {}, "grad_loss");
  check_tensor("hidden_z_loss", lse, sums, {z.size(0)}, "lse");
  check_tensor("hidden_z_loss", count, sums, {}, "count");
}

}  // namespace mmoe
