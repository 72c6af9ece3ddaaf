// The CPU kernels of hidden_z_loss on plain memory, a range of tokens a call; the contract is in hidden_z_loss.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <tuple>

#include "common/simd_dispatch.h"

namespace mmoe {

template <typename T, typename C>
struct HiddenZLossOf {
  // lse[begin..end); valid may be null.
  void (*forward)(const T* z, const bool* valid, C* lse, int64_t width, int64_t begin, int64_t end);
  // grad_z rows begin..end; factor = grad_loss * coefficient * 2 / count.
  void (*backward)(const T* z, const C* lse, C factor, T* grad_z, int64_t width, int64_t begin, int64_t end);
};

using HiddenZLossKernels = std::tuple<HiddenZLossOf<float, float>, HiddenZLossOf<torch::headeronly::BFloat16, float>,
                                      HiddenZLossOf<double, double>>;

MMOE_DECLARE_SIMD(HiddenZLossKernels, hidden_z_loss_kernels)

}  // namespace mmoe
