// hidden_z_loss on the device. No torch in this file.
//
// Forward: a warp per token, one pass: every lane keeps a running maximum and a sum scaled to it (online log-sum-exp)
// of the 16-byte vectors it reads, kHeld in flight, and the lanes' pairs are merged at the end. A second kernel of one
// block adds the T squares in a fixed order. Backward: a warp per token again, each element read and written once.
// Bytes moved, b bytes an element: forward T d b + 8 T, backward 2 T d b + 4 T; both are the floor.
//
// Not yet run on a GPU.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace mmoe::hidden_z_loss {

constexpr int kThreads = 128;
constexpr int kTokensPerBlock = kThreads / kWarp;
constexpr int kHeld = 4;  // pieces of a row that a lane has in flight
constexpr int kSumThreads = 1024;

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

// Calls visit(index, values) for the pieces of a row that are the lane's, kHeld of them in flight at a time.
template <typename T, bool kVectors, typename Visit>
__device__ __forceinline__ void for_each_piece(const PieceOf<T, kVectors>* __restrict__ row, int64_t pieces,
                                               Visit visit) {
  for (int64_t first = threadIdx.x % kWarp; first < pieces; first += kHeld * kWarp) {
    PieceOf<T, kVectors> held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kWarp < pieces) held[i] = load_piece(row + first + i * kWarp);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kWarp >= pieces) break;
      float values[kPiece<T, kVectors>];
      unpack_piece<T, kVectors>(held[i], values);
      visit(first + i * kWarp, values);
    }
  }
}

// A row is `pieces` of 16 bytes and aligned to them where kVectors, or else elements.
// <<<ceil(T / kTokensPerBlock), kThreads>>>
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    lse_kernel(const PieceOf<T, kVectors>* __restrict__ z, const bool* __restrict__ valid, int64_t tokens,
               int64_t pieces, float* __restrict__ lse) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarp;
  if (token >= tokens) return;
  if (valid != nullptr && !valid[token]) {
    if (lane == 0) lse[token] = 0.0f;
    return;
  }
  Running state;
  for_each_piece<T, kVectors>(z + token * pieces, pieces, [&](int64_t, auto& values) { add(state, values); });
#pragma unroll
  for (int reach = kWarp / 2; reach > 0; reach /= 2) {
    const float top = __shfl_xor_sync(kAllLanes, state.top, reach);
    const float sum = __shfl_xor_sync(kAllLanes, state.sum, reach);
    merge(state, top, sum);
  }
  if (lane == 0) lse[token] = state.top + logf(state.sum);
}

// loss = coefficient * sum of lse^2 / count, in an order that T alone fixes; lse is aligned to 16 bytes.
// <<<1, kSumThreads>>>
__global__ void __launch_bounds__(kSumThreads)
    mean_kernel(const float* __restrict__ lse, const bool* __restrict__ valid, int64_t tokens, float coefficient,
                float* __restrict__ loss, float* __restrict__ count) {
  constexpr int kCount = kVector<float>;
  MMOE_SHARED(float, totals, kWarp);
  MMOE_SHARED(float, counts, kWarp);
  float total = 0.0f, counted = 0.0f;
  for (int64_t first = threadIdx.x * kCount; first < tokens; first += kSumThreads * kCount) {
    float values[kCount] = {};
    if (first + kCount <= tokens) {
      load_vector(lse + first, values);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = first + i < tokens ? lse[first + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      total += values[i] * values[i];
      counted += first + i < tokens && (valid == nullptr || valid[first + i]) ? 1.0f : 0.0f;
    }
  }
  total = warp_sum(total);
  counted = warp_sum(counted);
  if (threadIdx.x % kWarp == 0) {
    totals[threadIdx.x / kWarp] = total;
    counts[threadIdx.x / kWarp] = counted;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  static_assert(kSumThreads == kWarp * kWarp);
  total = warp_sum(totals[threadIdx.x]);
  counted = warp_sum(counts[threadIdx.x]);
  if (threadIdx.x > 0) return;
  *loss = counted > 0.0f ? coefficient * total / counted : 0.0f;
  *count = counted;
}

__device__ __forceinline__ float slope(float value, float lse, float scale) {
  const float size = scale * __expf(fabsf(value) - lse);
  return value == 0.0f ? 0.0f : copysignf(size, value);
}

// Rows as above. <<<ceil(T / kTokensPerBlock), kThreads>>>
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const float* __restrict__ grad_loss, const PieceOf<T, kVectors>* __restrict__ z,
                    const float* __restrict__ lse, const float* __restrict__ count, float coefficient, int64_t tokens,
                    int64_t pieces, PieceOf<T, kVectors>* __restrict__ grad_z) {
  using Piece = PieceOf<T, kVectors>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarp;
  if (token >= tokens) return;
  const float row_lse = lse[token];
  Piece* grad = grad_z + token * pieces;
  // A token that is left out has lse = 0 and so a gradient of 0, whatever it holds.
  if (row_lse == 0.0f) {
    for (int64_t piece = threadIdx.x % kWarp; piece < pieces; piece += kWarp) store_piece(grad + piece, Piece{});
    return;
  }
  const float scale = *grad_loss * 2.0f * coefficient / *count * row_lse;
  for_each_piece<T, kVectors>(z + token * pieces, pieces, [&](int64_t piece, auto& values) {
#pragma unroll
    for (float& value : values) value = slope(value, row_lse, scale);
    store_piece(grad + piece, pack_piece<T, kVectors>(values));
  });
}

}  // namespace mmoe::hidden_z_loss
