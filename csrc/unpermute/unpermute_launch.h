// What the launchers of permute and unpermute share.
#pragma once

#include "common/launch.h"
#include "permute/permute.h"
#include "permute/permute_heuristics.h"
#include "permute/rows.cuh"

namespace mmoe {

inline unsigned pad_blocks(int64_t rows) {
  return static_cast<unsigned>((rows + permute::kPadRows - 1) / permute::kPadRows);
}

// What unpermute adds to the sum of a token's rows, all or nothing; without it the weights are 1.
struct Mix {
  Tensor weights, x, identity;
};

// [T, d]: the sum of each token's rows, all tensors contiguous. Gives permute its gradient.
Tensor sum_rows(const char* what, const Tensor& rows, const Tensor& row_of_slot, const Mix* mix);

}  // namespace mmoe
