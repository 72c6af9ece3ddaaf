// unpermute: the experts' rows brought back to their tokens, and the zero experts' identity added.
//
//   rows        [R, d] float32, bfloat16 (float64 on the CPU, float16 on CUDA)
//   row_of_slot [T, k] int32 from permute_index; -1 is no row
//   weights     [T, k] float32 (float64 for float64 rows)
//   x           [T, d], dtype of rows
//   identity    [T], dtype of weights
//   slot_of_row [R] int32 from permute_index, read by the backward alone, which then writes zeros to the rows without a
//               slot and nothing twice; without it, it clears all of grad_rows first
// ->
//   out [T, d], dtype of rows: sum over j of weights[t, j] * rows[row_of_slot[t, j]] in slot order, then
//   + identity[t] * x[t], all in the dtype of weights. A slot without a row adds nothing, whatever its weight.
// backward, for row r of slot (t, j):
//   grad_rows     [r] = weights[t, j] * grad_out[t]; 0 in a row without a slot
//   grad_weights  [t, j] = rows[r] . grad_out[t]; 0 for a slot without a row
//   grad_x        [t] = identity[t] * grad_out[t]
//   grad_identity [t] = x[t] . grad_out[t]
//
// RuntimeError: naming the argument of another shape or dtype; on the CPU also a row outside 0 ... R - 1 in
// row_of_slot, which on CUDA adds nothing.
#pragma once

#include <optional>
#include <tuple>

#include "permute/permute.h"

namespace mmoe {

using UnpermuteGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline void check_unpermute(const Tensor& rows, const Tensor& row_of_slot, const Tensor& weights, const Tensor& x,
                            const Tensor& identity, const std::optional<Tensor>& slot_of_row) {
  check(rows.dim() == 2, "unpermute: rows must be [R, d]");
  check(rows.size(0) <= std::numeric_limits<int32_t>::max(), "unpermute: rows has more rows than int32 counts");
  check_row_of_slot("unpermute", row_of_slot);
  const int64_t tokens = row_of_slot.size(0);
  const ScalarType type = sum_type(rows.scalar_type());
  check_tensor("unpermute", weights, type, {tokens, row_of_slot.size(1)}, "weights");
  check_tensor("unpermute", x, rows.scalar_type(), {tokens, rows.size(1)}, "x");
  check_tensor("unpermute", identity, type, {tokens}, "identity");
  check_tensor("unpermute", slot_of_row, ScalarType::Int, {rows.size(0)}, "slot_of_row");
}

inline void check_unpermute_grad(const Tensor& grad_out, const Tensor& x) {
  check_tensor("unpermute", grad_out, x.scalar_type(), {x.size(0), x.size(1)}, "grad_out");
}

}  // namespace mmoe
