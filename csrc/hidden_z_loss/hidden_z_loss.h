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

#include "common/checks.h"

namespace mmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using HiddenZLoss = std::tuple<Tensor, Tensor, Tensor>;

inline void check_hidden_z_loss(const Tensor& z, const std::optional<Tensor>& valid) {
  check(z.dim() == 2 && z.size(1) >= 1, "hidden_z_loss: z must be [T, d] with d >= 1");
  if (!valid) return;
  check(valid->scalar_type() == ScalarType::Bool, "hidden_z_loss: valid must be bool");
  check(valid->dim() == 1 && valid->size(0) == z.size(0), "hidden_z_loss: valid must be [T] with T = ", z.size(0));
}

inline ScalarType accumulated(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace mmoe
