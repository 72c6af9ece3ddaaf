// hidden_z_loss on the device. No torch in this file.
//
// Forward: a warp per token, one pass: every lane keeps a running maximum and a sum scaled to it (online log-sum-exp)
// of the 16-byte vectors it reads, and the lanes' pairs are merged at the end. A second kernel of one block adds the T
// squares in a fixed order. Backward: a warp per token again, each element read and written once.
// Bytes moved, b bytes an element: forward T d b + 8 T, backward 2 T d b + 4 T; both are the floor.
//
// Not yet run on a GPU.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace mmoe::hidden_z_loss {

constexpr int kThreads = 128;
constexpr int kTokensPerBlock = kThreads / kWarp;
constexpr int kSumThreads = 256;

// Running log-sum-exp: sum of exp(value - top). Starts at top = 0, which is below every |z|.
struct Running {
  float top = 0.0f;
  float sum = 0.0f;
};

__device__ __forceinline__ void merge(Running& state, float top, float sum) {
  const float higher = max_or_nan(state.top, top);
  // Equal tops are the common case and would give inf - inf for infinite ones.
  const float mine = state.top == higher ? state.sum : state.sum * __expf(state.top - higher);
  const float other = top == higher ? sum : sum * __expf(top - higher);
  state = {higher, mine + other};
}

template <int kCount>
__device__ __forceinline__ void add(Running& state, const float (&values)[kCount]) {
  float top = fabsf(values[0]);
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = max_or_nan(top, fabsf(values[i]));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += __expf(fabsf(values[i]) - top);
  merge(state, top, sum);
}

// Where kVectors, every row of z is aligned to 16 bytes. <<<ceil(T / kTokensPerBlock), kThreads>>>
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads) lse_kernel(const T* __restrict__ z, const bool* __restrict__ valid,
                                                       int64_t tokens, int64_t width, float* __restrict__ lse) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarp;
  if (token >= tokens) return;
  if (valid != nullptr && !valid[token]) {
    if (lane == 0) lse[token] = 0.0f;
    return;
  }
  const T* row = z + token * width;
  Running state;
  const int64_t body = kVectors ? width - width % kVector<T> : 0;
  if constexpr (kVectors) {
    for (int64_t i = static_cast<int64_t>(lane) * kVector<T>; i < body; i += kWarp * kVector<T>) {
      float values[kVector<T>];
      load_vector(row + i, values);
      add(state, values);
    }
  }
  for (int64_t i = body + lane; i < width; i += kWarp) {
    const float value[1] = {to_float(row[i])};
    add(state, value);
  }
#pragma unroll
  for (int reach = kWarp / 2; reach > 0; reach /= 2) {
    const float top = __shfl_xor_sync(kAllLanes, state.top, reach);
    const float sum = __shfl_xor_sync(kAllLanes, state.sum, reach);
    merge(state, top, sum);
  }
  if (lane == 0) lse[token] = state.top + logf(state.sum);
}

// loss = coefficient * sum of lse^2 / count. <<<1, kSumThreads>>>
__global__ void __launch_bounds__(kSumThreads)
    mean_kernel(const float* __restrict__ lse, const bool* __restrict__ valid, int64_t tokens, float coefficient,
                float* __restrict__ loss, float* __restrict__ count) {
  MMOE_SHARED(float, totals, kSumThreads / kWarp);
  MMOE_SHARED(float, counts, kSumThreads / kWarp);
  float total = 0.0f, counted = 0.0f;
  for (int64_t token = threadIdx.x; token < tokens; token += kSumThreads) {
    total += lse[token] * lse[token];
    counted += valid == nullptr || valid[token] ? 1.0f : 0.0f;
  }
  total = warp_sum(total);
  counted = warp_sum(counted);
  if (threadIdx.x % kWarp == 0) {
    totals[threadIdx.x / kWarp] = total;
    counts[threadIdx.x / kWarp] = counted;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kSumThreads / kWarp; ++warp) {
    total += totals[warp];
    counted += counts[warp];
  }
  *loss = counted > 0.0f ? coefficient * total / counted : 0.0f;
  *count = counted;
}

__device__ __forceinline__ float slope(float value, float lse, float scale) {
  const float size = scale * __expf(fabsf(value) - lse);
  return value == 0.0f ? 0.0f : copysignf(size, value);
}

// Where kVectors, every row of z and grad_z is aligned to 16 bytes. <<<ceil(T / kTokensPerBlock), kThreads>>>
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const float* __restrict__ grad_loss, const T* __restrict__ z, const float* __restrict__ lse,
                    const float* __restrict__ count, float coefficient, int64_t tokens, int64_t width,
                    T* __restrict__ grad_z) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarp;
  if (token >= tokens) return;
  const float row_lse = lse[token];
  // A token that is left out has lse = 0 and so a gradient of 0, whatever it holds.
  const float scale = row_lse == 0.0f ? 0.0f : *grad_loss * 2.0f * coefficient / *count * row_lse;
  const T* row = z + token * width;
  T* grad = grad_z + token * width;
  const int64_t body = kVectors ? width - width % kVector<T> : 0;
  if constexpr (kVectors) {
    for (int64_t i = static_cast<int64_t>(lane) * kVector<T>; i < body; i += kWarp * kVector<T>) {
      float values[kVector<T>];
      load_vector(row + i, values);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) values[j] = row_lse == 0.0f ? 0.0f : slope(values[j], row_lse, scale);
      store_vector(grad + i, values);
    }
  }
  for (int64_t i = body + lane; i < width; i += kWarp) {
    grad[i] = from_float<T>(row_lse == 0.0f ? 0.0f : slope(to_float(row[i]), row_lse, scale));
  }
}

}  // namespace mmoe::hidden_z_loss
