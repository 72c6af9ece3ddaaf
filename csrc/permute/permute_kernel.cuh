// permute's copy on the device. No torch in this file.
//
// A block per token: every thread holds kHeld pieces of the token's features in registers and writes them to the row of
// each slot, so x is read from memory once. (A block per row would read it once a slot: rows of one token lie far apart
// and x is larger than the second-level cache at training's sizes.) Blocks behind those of the tokens write zeros to
// rows without a slot. Bytes moved, b an element: T d b + R d b and 4 (T k + R) of the index, a warp each; the floor.
//
// Copies bits, so one instance serves all dtypes of a size. Not yet run on a GPU.
#pragma once

#include "permute/rows.cuh"

namespace mmoe::permute {

constexpr int kHeld = 4;

// Piece: uint4, or an element where rows are not aligned to 16 bytes. <<<tokens + ceil(rows / kPadRows), row_threads>>>
template <typename Piece>
__global__ void __launch_bounds__(512, 2)
    copy_kernel(const Piece* __restrict__ x, const int* __restrict__ row_of_slot, const int* __restrict__ slot_of_row,
                int tokens, int rows, int top_k, int pieces, Piece* __restrict__ out) {
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  if (block >= tokens) {
    for_each_padding_row(slot_of_row, block - tokens, rows, [&](int64_t row) { zero_row(out + row * pieces, pieces); });
    return;
  }
  const int* rows_of_token = row_of_slot + static_cast<int64_t>(block) * top_k;
  for (int first = thread; first - thread < pieces; first += kHeld * threads) {
    Piece held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int piece = first + i * threads;
      if (piece < pieces) held[i] = load_piece(x + static_cast<int64_t>(block) * pieces + piece);
    }
    for_each_row(
        rows_of_token, top_k, rows, [](int) { return 0.0f; },
        [&](int, int64_t row, float) {
#pragma unroll
          for (int i = 0; i < kHeld; ++i) {
            const int piece = first + i * threads;
            if (piece < pieces) store_piece(out + row * pieces + piece, held[i]);
          }
        });
  }
}

}  // namespace mmoe::permute
