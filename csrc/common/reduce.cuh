// Reductions over a warp, the result in every lane. The order of the additions is fixed.
#pragma once

#include "common/device.cuh"

namespace mmoe {

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int reach = kWarp / 2; reach > 0; reach /= 2) value += __shfl_xor_sync(kAllLanes, value, reach);
  return value;
}

// NaN wins over every number, unlike fmaxf.
__device__ __forceinline__ float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int reach = kWarp / 2; reach > 0; reach /= 2) {
    value = max_or_nan(value, __shfl_xor_sync(kAllLanes, value, reach));
  }
  return value;
}

}  // namespace mmoe
