// permute_index: sort the routed slots by expert, keeping the order of the slots inside an expert.
//
//   ids         [T, k] int32 or int64. Slot s = t * k + j of token t goes to expert ids[t, j]; an id >= experts is a
//               zero-computation expert and takes no row.
//   align       every expert's run of rows is padded to a multiple of it, at least 1
//   max_rows    the number of rows to lay out, or none: R, as many as the aligned runs need
// ->
//   row_of_slot [T, k] int32: the row of the slot in the sorted order, -1 for a zero expert.
//   slot_of_row [R or max_rows] int32: the inverse; -1 for a row of padding and behind the last run.
//   offsets     [experts + 1] int32: expert e owns the rows offsets[e] to offsets[e + 1], its padding among them.
// Where the runs need more than max_rows, the rows from max_rows on are dropped: their slots get -1, and no offset is
// larger than max_rows.
//
// RuntimeError: ids of another dtype or rank, experts or align < 1, max_rows < 0, T * k + experts * (align - 1) or
// max_rows beyond int32; a negative id, except on CUDA with max_rows, where nothing waits for the device and a negative
// id takes no row.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "common/checks.h"

namespace mmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using PermuteIndex = std::tuple<Tensor, Tensor, Tensor>;

inline void check_permute_index(const Tensor& ids, int64_t experts, int64_t align, std::optional<int64_t> max_rows) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  check(ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long,
        "permute_index: ids must be int32 or int64");
  check(ids.dim() == 2, "permute_index: ids must be [T, k], got ", ids.dim(), " dimensions");
  check(experts >= 1 && experts <= most, "permute_index: experts must be at least 1, got ", experts);
  check(align >= 1 && align <= most, "permute_index: align must be at least 1, got ", align);
  check(ids.numel() <= most - experts * (align - 1), "permute_index: T * k = ", ids.numel(), " and the padding of ",
        experts, " experts to multiples of ", align, " do not fit in int32");
  check(!max_rows || (*max_rows >= 0 && *max_rows <= most),
        "permute_index: max_rows must be in int32 and not negative");
}

inline void check_no_negative_id(bool found) { check(!found, "permute_index: ids must not be negative"); }

}  // namespace mmoe
