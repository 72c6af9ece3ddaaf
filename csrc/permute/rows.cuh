// What the kernels of permute and unpermute share: a token's rows in slot order, and rows of zeros. No torch here.
#pragma once

#include "common/vector.cuh"

namespace mmoe::permute {

// Rows that one block beyond those of the tokens looks at for padding. Whether any row is padding the device alone
// knows (a zero expert's slot has no row), so there are such blocks for all of them; one without padding reads 128
// bytes.
constexpr int kPadRows = 32;

// Calls visit(j, row, of_slot(j)) for every slot j of a token that has a row, in slot order, all lanes of a warp
// together. A lane loads the row, and what of_slot gives, of one slot in 32. Rows outside 0 ... rows - 1 are left out.
template <typename OfSlot, typename Visit>
__device__ __forceinline__ void for_each_row(const int* __restrict__ row_of_slot, int top_k, int rows, OfSlot of_slot,
                                             Visit visit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int first = 0; first < top_k; first += kWarp) {
    const bool inside = first + lane < top_k;
    const int mine = inside ? row_of_slot[first + lane] : -1;
    const float weight = inside ? of_slot(first + lane) : 0.0f;
    unsigned left = __ballot_sync(kAllLanes, mine >= 0 && mine < rows);
    while (left != 0) {
      const int j = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      visit(first + j, static_cast<int64_t>(__shfl_sync(kAllLanes, mine, j)), __shfl_sync(kAllLanes, weight, j));
    }
  }
}

// Calls zero(row) for those of the block's kPadRows rows that have no slot; every thread of the block the same rows.
template <typename Zero>
__device__ __forceinline__ void for_each_padding_row(const int* __restrict__ slot_of_row, int block, int rows,
                                                     Zero zero) {
  const int row = block * kPadRows + static_cast<int>(threadIdx.x) % kWarp;
  unsigned left = __ballot_sync(kAllLanes, row < rows && slot_of_row[row] < 0);
  while (left != 0) {
    zero(static_cast<int64_t>(block) * kPadRows + __ffs(static_cast<int>(left)) - 1);
    left &= left - 1;
  }
}

template <typename Piece>
__device__ __forceinline__ void zero_row(Piece* __restrict__ row, int pieces) {
  for (int piece = static_cast<int>(threadIdx.x); piece < pieces; piece += static_cast<int>(blockDim.x)) {
    store_piece(row + piece, Piece{});
  }
}

}  // namespace mmoe::permute
