// unpermute: the experts' rows brought back to their tokens, and the zero experts' identity added.
//
//   rows        [R, d] float32, bfloat16 (float64 on the CPU, float16 on CUDA)
//   row_of_slot [T, k] int32 from permute_index; -1 is no row
//   weights     [T, k] float32 (float64 for float64 rows)
//   x           [T, d], dtype of rows
//   identity    [T], dtype of weights
//   slot_of_row [R] int32 from permute_index, or none where every row belongs to a slot; read by the backward alone
// ->
//   out [T, d], dtype of rows: sum over j of weights[t, j] * rows[row_of_slot[t, j]] in slot order, then
//   + identity[t] * x[t], all in the dtype of weights. A slot without a row adds nothing, whatever its weight.
// backward, for row r of slot (t, j):
//   grad_rows     [r] = weights[t, j] * grad_out[t]; 0 in a row whose slot_of_row is -1
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

inline ScalarType summed_in(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_unpermute(const Tensor& rows, const Tensor& row_of_slot, const Tensor& weights, const Tensor& x,
                            const Tensor& identity, const std::optional<Tensor>& slot_of_row) {
  check(rows.dim() == 2, "unpermute: rows must be [R, d]");
  check(rows.size(0) <= std::numeric_limits<int32_t>::max(), "unpermute: rows has more rows than int32 counts");
  check_row_of_slot("unpermute", row_of_slot);
  const int64_t tokens = row_of_slot.size(0);
  const ScalarType type = summed_in(rows.scalar_type());
  check(weights.dim() == 2 && weights.size(0) == tokens && weights.size(1) == row_of_slot.size(1),
        "unpermute: weights must be [T, k] as row_of_slot is");
  check(weights.scalar_type() == type, "unpermute: weights must be float32 (float64 for float64 rows)");
  check(x.dim() == 2 && x.size(0) == tokens && x.size(1) == rows.size(1),
        "unpermute: x must be [T, d] with T = ", tokens, " and d = ", rows.size(1));
  check(x.scalar_type() == rows.scalar_type(), "unpermute: x must have the dtype of rows");
  check(identity.dim() == 1 && identity.size(0) == tokens, "unpermute: identity must be [T] with T = ", tokens);
  check(identity.scalar_type() == type, "unpermute: identity must have the dtype of weights");
  if (!slot_of_row) return;
  check_slot_of_row("unpermute", *slot_of_row);
  check(slot_of_row->size(0) == rows.size(0), "unpermute: slot_of_row must be [R] with R = ", rows.size(0));
}

inline void check_unpermute_grad(const Tensor& grad_out, const Tensor& x) {
  check(grad_out.dim() == 2 && grad_out.size(0) == x.size(0) && grad_out.size(1) == x.size(1),
        "unpermute: grad_out must have the shape of x");
  check(grad_out.scalar_type() == x.scalar_type(), "unpermute: grad_out must have the dtype of x");
}

}  // namespace mmoe
