// permute: a token's features copied to the row of each of its slots, in the order of permute_index.
//
//   x           [T, d] float32, bfloat16 (float64 on the CPU, float16 on CUDA)
//   row_of_slot [T, k] int32, slot_of_row [R] int32: from permute_index; -1 is no row and no slot
// ->
//   rows        [R, d], dtype of x: rows[r] = x[slot_of_row[r] / k]; a row without a slot is 0
// backward: grad_x[t] = sum over j, in slot order and in fp32 (fp64 for float64), of grad_rows[row_of_slot[t, j]].
//
// permute_fp8: the same, quantised on the way in blocks of 1 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3).
//   x           [T, d] float32, bfloat16, float16; d a multiple of 128
// ->
//   rows        [R, d] float8_e4m3fn: x * (448 / amax) of the block, rounded to nearest even
//   scales      [R, d / 128] float32: amax / 448, to multiply rows with. Where that is not a normal number (a block of
//               zeros or of numbers below 2^-117), the scale is 1 and rows are x rounded, which is 0; so in a row
//               without a slot. NaN or infinity in a block makes its scale and so what it stands for not finite.
//
// RuntimeError: naming the argument of another shape or dtype; on the CPU also a row outside 0 ... R - 1 in
// row_of_slot, which on CUDA is left out.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>

#include "common/arguments.h"

namespace mmoe {

constexpr int64_t kFp8Block = 128;

inline void check_row_of_slot(const char* what, const Tensor& row_of_slot) {
  check(row_of_slot.scalar_type() == ScalarType::Int && row_of_slot.dim() == 2, what,
        ": row_of_slot must be [T, k] int32");
}

inline void check_slot_of_row(const char* what, const Tensor& slot_of_row) {
  check(slot_of_row.scalar_type() == ScalarType::Int && slot_of_row.dim() == 1, what,
        ": slot_of_row must be [R] int32");
}

inline void check_permute(const char* what, const Tensor& x, const Tensor& row_of_slot, const Tensor& slot_of_row) {
  check(x.dim() == 2, what, ": x must be [T, d]");
  check_row_of_slot(what, row_of_slot);
  check_slot_of_row(what, slot_of_row);
  check(row_of_slot.size(0) == x.size(0), what, ": row_of_slot must be [T, k] with T = ", x.size(0));
  check(slot_of_row.size(0) <= std::numeric_limits<int32_t>::max(), what,
        ": slot_of_row has more rows than int32 counts");
}

inline void check_permute_backward(const Tensor& grad_rows, const Tensor& row_of_slot) {
  check(grad_rows.dim() == 2, "permute: grad_rows must be [R, d]");
  check_row_of_slot("permute", row_of_slot);
}

}  // namespace mmoe
