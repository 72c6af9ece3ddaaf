// grouped_linear: rows sorted by expert, each times its expert's weight. The CPU's; on CUDA torch's grouped_mm is one
// kernel already (mmoe/ops/grouped_linear.py).
//
//   rows   [R, K] float32, bfloat16, float64
//   weight [n, ..., K], dtype of rows; N is the product of the dimensions between
//   ends   [n] int32: expert e owns rows ends[e - 1] ... ends[e] - 1, expert 0 from row 0; rows from ends[n - 1] on
//          have no expert
//   into_main_grad: for autograd alone (mmoe/ops/grouped_linear.py); the kernel does not look at it
// ->
//   out [R, N], dtype of rows: out[r] = weight[e] rows[r], 0 in a row without an expert
// backward:
//   grad_rows   [R, K]: weight[e]^T grad_out[r], 0 in a row without an expert
//   grad_weight, shape of weight: for each expert the sum over its rows of grad_out[r] rows[r]^T; add_grad_weight adds
//               it to what `into`, of that shape, holds
//
// RuntimeError: naming the argument of another shape or dtype; ends that fall or pass R.
#pragma once

#include "common/arguments.h"

namespace mmoe {

// Of one expert: [rows, inputs] in, [rows, outputs] out.
struct GroupedShape {
  int64_t rows, inputs, outputs, experts;
};

// `name`: what the caller calls the weight, or what has its shape.
inline GroupedShape check_grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& ends,
                                         const char* name = "weight") {
  const ScalarType dtype = rows.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Double,
        "grouped_linear: rows must be float32, bfloat16 or float64 on the CPU");
  check(rows.dim() == 2, "grouped_linear: rows must be [R, K]");
  check(weight.dim() >= 3, "grouped_linear: ", name, " must be [n, ..., K]");
  check(weight.scalar_type() == dtype, "grouped_linear: ", name, " is ", name_of(weight.scalar_type()), ", must be ",
        name_of(dtype), " as rows is");
  const int64_t inputs = rows.size(1), experts = weight.size(0);
  check(weight.size(weight.dim() - 1) == inputs, "grouped_linear: ", name, " must be [n, ..., ", inputs, "]");
  check_tensor("grouped_linear", ends, ScalarType::Int, {experts}, "ends");
  int64_t outputs = 1;
  for (int64_t i = 1; i + 1 < weight.dim(); ++i) outputs *= weight.size(i);
  return {rows.size(0), inputs, outputs, experts};
}

}  // namespace mmoe
