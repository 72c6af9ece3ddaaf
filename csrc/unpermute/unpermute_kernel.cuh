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
using permute::zero_row;

constexpr int kHeld = 2;

// Piece number first + i * threads of a row for each i; 0 behind the row's end.
template <typename Piece>
__device__ __forceinline__ void load_pieces(const Piece* __restrict__ row, int first, int pieces,
                                            Piece (&held)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int piece = first + i * static_cast<int>(blockDim.x);
    held[i] = piece < pieces ? load_piece(row + piece) : Piece{};
  }
}

// Where kVectors, the rows of every matrix are aligned to 16 bytes; a row is `pieces` of them, or else elements. Null
// weights are 1 each, null x is no identity term (the gradient of permute). <<<tokens, row_threads>>>
template <typename T, bool kVectors>
__global__ void __launch_bounds__(512, 2)
    forward_kernel(const PieceOf<T, kVectors>* __restrict__ rows, const int* __restrict__ row_of_slot,
                   const float* __restrict__ weights, const PieceOf<T, kVectors>* __restrict__ x,
                   const float* __restrict__ identity, int row_count, int top_k, int pieces,
                   PieceOf<T, kVectors>* __restrict__ out) {
  constexpr int kCount = kPiece<T, kVectors>;
  using Piece = PieceOf<T, kVectors>;
  const int64_t token = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int first = thread; first - thread < pieces; first += kHeld * threads) {
    float sums[kHeld][kCount] = {};
    const auto add = [&](const Piece* __restrict__ row, float factor) {
      Piece held[kHeld];
      load_pieces(row, first, pieces, held);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        float values[kCount];
        unpack_piece<T, kVectors>(held[i], values);
#pragma unroll
        for (int j = 0; j < kCount; ++j) sums[i][j] += factor * values[j];
      }
    };
    for_each_row(
        row_of_slot + token * top_k, top_k, row_count,
        [&](int j) { return weights == nullptr ? 1.0f : weights[token * top_k + j]; },
        [&](int, int64_t row, float weight) { add(rows + row * pieces, weight); });
    if (x != nullptr) add(x + token * pieces, identity[token]);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int piece = first + i * threads;
      if (piece < pieces) store_piece(out + token * pieces + piece, pack_piece<T, kVectors>(sums[i]));
    }
  }
}

// Where kVectors, as above. Shared: (threads / kWarp) * (top_k + 1) floats.
// <<<tokens or, with slot_of_row, tokens + ceil(row_count / kPadRows), row_threads>>>
template <typename T, bool kVectors>
__global__ void __launch_bounds__(512, 2)
    backward_kernel(const PieceOf<T, kVectors>* __restrict__ grad_out, const PieceOf<T, kVectors>* __restrict__ rows,
                    const int* __restrict__ row_of_slot, const float* __restrict__ weights,
                    const PieceOf<T, kVectors>* __restrict__ x, const float* __restrict__ identity,
                    const int* __restrict__ slot_of_row, int tokens, int row_count, int top_k, int pieces,
                    PieceOf<T, kVectors>* __restrict__ grad_rows, float* __restrict__ grad_weights,
                    PieceOf<T, kVectors>* __restrict__ grad_x, float* __restrict__ grad_identity) {
  constexpr int kCount = kPiece<T, kVectors>;
  using Piece = PieceOf<T, kVectors>;
  MMOE_DYNAMIC_SHARED(float, dots);  // [warp][top_k + 1], the identity's last
  const int block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp;
  if (block >= tokens) {
    for_each_padding_row(slot_of_row, block - tokens, row_count,
                         [&](int64_t row) { zero_row(grad_rows + row * pieces, pieces); });
    return;
  }
  const int64_t token = block;
  float* warp_dots = dots + thread / kWarp * (top_k + 1);
  for (int j = lane; j <= top_k; j += kWarp) warp_dots[j] = 0.0f;
  __syncwarp();
  for (int first = thread; first - thread < pieces; first += kHeld * threads) {
    Piece grads[kHeld];
    load_pieces(grad_out + token * pieces, first, pieces, grads);
    // scaled = factor * grad_out; adds values . grad_out to this warp's dot j.
    const auto pass = [&](int j, const Piece* __restrict__ values, float factor, Piece* __restrict__ scaled) {
      Piece held[kHeld];
      load_pieces(values, first, pieces, held);
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        float value[kCount], grad[kCount];
        unpack_piece<T, kVectors>(held[i], value);
        unpack_piece<T, kVectors>(grads[i], grad);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          dot += value[e] * grad[e];
          grad[e] *= factor;
        }
        const int piece = first + i * threads;
        if (piece < pieces) store_piece(scaled + piece, pack_piece<T, kVectors>(grad));
      }
      dot = warp_sum(dot);
      if (lane == 0) warp_dots[j] += dot;
    };
    for_each_row(
        row_of_slot + token * top_k, top_k, row_count, [&](int j) { return weights[token * top_k + j]; },
        [&](int j, int64_t row, float weight) { pass(j, rows + row * pieces, weight, grad_rows + row * pieces); });
    pass(top_k, x + token * pieces, identity[token], grad_x + token * pieces);
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
