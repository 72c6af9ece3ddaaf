// unpermute on the device. No torch in this file.
//
// Forward: a block per token; every thread keeps the fp32 sums of kHeld pieces of the token's features and adds the
// slots' rows to them in slot order, each row read once, then identity * x. No slot without a row is looked at.
// Backward: a block per token again; grad_out is held in registers while the token's rows and x stream past it, so one
// pass gives all four gradients. A dot product is summed over a warp by shuffles and over the block's warps in shared
// memory, in a fixed order. Blocks behind those of the tokens write zeros to rows without a slot.
// Bytes moved, b an element: forward (R + 2 T) d b + 8 T k, backward (2 R + 3 T) d b + 12 T k (+ 4 R with slot_of_row);
// both are the floor.
//
// Not yet run on a GPU.
#pragma once

#include "common/reduce.cuh"
#include "permute/rows.cuh"

namespace mmoe::unpermute {

using permute::for_each_padding_row;
using permute::for_each_row;
using permute::kPiece;
using permute::load_values;
using permute::store_values;
using permute::zero_row;

constexpr int kHeld = 2;

// Where kVectors, the rows of every matrix are aligned to 16 bytes. Null weights are 1 each, null x is no identity term
// (the gradient of permute). <<<tokens, row_threads>>>
template <typename T, bool kVectors>
__global__ void __launch_bounds__(512, 2)
    forward_kernel(const T* __restrict__ rows, const int* __restrict__ row_of_slot, const float* __restrict__ weights,
                   const T* __restrict__ x, const float* __restrict__ identity, int row_count, int top_k, int pieces,
                   T* __restrict__ out) {
  constexpr int kCount = kPiece<T, kVectors>;
  const int64_t token = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t width = static_cast<int64_t>(pieces) * kCount;
  for (int first = thread; first - thread < pieces; first += kHeld * threads) {
    float sums[kHeld][kCount] = {};
    const auto add = [&](const T* __restrict__ row, float factor) {
      float values[kHeld][kCount] = {};
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int piece = first + i * threads;
        if (piece < pieces) load_values<T, kVectors>(row + static_cast<int64_t>(piece) * kCount, values[i]);
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) sums[i][j] += factor * values[i][j];
      }
    };
    for_each_row(
        row_of_slot + token * top_k, top_k, row_count,
        [&](int j) { return weights == nullptr ? 1.0f : weights[token * top_k + j]; },
        [&](int, int64_t row, float weight) { add(rows + row * width, weight); });
    if (x != nullptr) add(x + token * width, identity[token]);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int piece = first + i * threads;
      if (piece < pieces)
        store_values<T, kVectors>(out + token * width + static_cast<int64_t>(piece) * kCount, sums[i]);
    }
  }
}

// Where kVectors, as above. Shared: (threads / kWarp) * (top_k + 1) floats.
// <<<tokens or, with slot_of_row, tokens + ceil(row_count / kPadRows), row_threads>>>
template <typename T, bool kVectors>
__global__ void __launch_bounds__(512, 2)
    backward_kernel(const T* __restrict__ grad_out, const T* __restrict__ rows, const int* __restrict__ row_of_slot,
                    const float* __restrict__ weights, const T* __restrict__ x, const float* __restrict__ identity,
                    const int* __restrict__ slot_of_row, int tokens, int row_count, int top_k, int pieces,
                    T* __restrict__ grad_rows, float* __restrict__ grad_weights, T* __restrict__ grad_x,
                    float* __restrict__ grad_identity) {
  constexpr int kCount = kPiece<T, kVectors>;
  using Piece = std::conditional_t<kVectors, uint4, T>;
  MMOE_DYNAMIC_SHARED(float, dots);  // [warp][top_k + 1], the identity's last
  const int block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp;
  const int64_t width = static_cast<int64_t>(pieces) * kCount;
  if (block >= tokens) {
    for_each_padding_row(slot_of_row, block - tokens, row_count,
                         [&](int64_t row) { zero_row(reinterpret_cast<Piece*>(grad_rows + row * width), pieces); });
    return;
  }
  const int64_t token = block;
  float* warp_dots = dots + thread / kWarp * (top_k + 1);
  for (int j = lane; j <= top_k; j += kWarp) warp_dots[j] = 0.0f;
  __syncwarp();
  for (int first = thread; first - thread < pieces; first += kHeld * threads) {
    float grads[kHeld][kCount] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int piece = first + i * threads;
      if (piece < pieces)
        load_values<T, kVectors>(grad_out + token * width + static_cast<int64_t>(piece) * kCount, grads[i]);
    }
    // scaled = factor * grad_out; adds values . grad_out to this warp's dot j.
    const auto pass = [&](int j, const T* __restrict__ values, float factor, T* __restrict__ scaled) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int piece = first + i * threads;
        if (piece >= pieces) continue;
        float here[kCount], product[kCount];
        load_values<T, kVectors>(values + static_cast<int64_t>(piece) * kCount, here);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          dot += here[e] * grads[i][e];
          product[e] = factor * grads[i][e];
        }
        store_values<T, kVectors>(scaled + static_cast<int64_t>(piece) * kCount, product);
      }
      dot = warp_sum(dot);
      if (lane == 0) warp_dots[j] += dot;
    };
    for_each_row(
        row_of_slot + token * top_k, top_k, row_count, [&](int j) { return weights[token * top_k + j]; },
        [&](int j, int64_t row, float weight) { pass(j, rows + row * width, weight, grad_rows + row * width); });
    pass(top_k, x + token * width, identity[token], grad_x + token * width);
  }
  __syncthreads();
  for (int j = thread; j <= top_k; j += threads) {
    float total = 0.0f;
    for (int warp = 0; warp < threads / kWarp; ++warp) total += dots[warp * (top_k + 1) + j];
    if (j < top_k) {
      grad_weights[token * top_k + j] = total;
    } else {
      grad_identity[token] = total;
    }
  }
}

}  // namespace mmoe::unpermute
