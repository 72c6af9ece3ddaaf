// permute_index: sort the routed slots by expert, keeping the order of the slots inside an expert.
//
//   ids         [T, k] int32 or int64, contiguous. Slot s = t * k + j of token t goes to expert ids[t, j];
//               an id >= experts is a zero-computation expert and takes no row.
//   row_of_slot [T, k] int32: the row of the slot in the sorted order, -1 for a zero expert.
//   slot_of_row [R]    int32: the inverse; R is the number of slots with id < experts.
//   offsets     [experts + 1] int32: expert e owns the rows offsets[e] to offsets[e + 1]; offsets[experts] = R.
//
// RuntimeError: ids of another dtype or rank, experts < 1, T * k beyond int32, a negative id.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "common/checks.h"

namespace mmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using PermuteIndex = std::tuple<Tensor, Tensor, Tensor>;

inline void check_permute_index(const Tensor& ids, int64_t experts) {
  check(ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long,
        "permute_index: ids must be int32 or int64");
  check(ids.dim() == 2, "permute_index: ids must be [T, k], got ", ids.dim(), " dimensions");
  check(experts >= 1, "permute_index: experts must be at least 1, got ", experts);
  check(ids.numel() <= std::numeric_limits<int32_t>::max(), "permute_index: T * k = ", ids.numel(),
        " does not fit in int32");
}

inline void check_no_negative_id(bool found) { check(!found, "permute_index: ids must not be negative"); }

}  // namespace mmoe
