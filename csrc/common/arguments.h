// Checks of an operator's tensors; whatever is wrong is said with the argument's name.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "common/checks.h"

namespace mmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype in which values of `dtype` are summed.
inline ScalarType sum_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "of another dtype";
  }
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (int64_t size : shape) {
    if (tensor.size(i++) != size) return false;
  }
  return true;
}

// `name` in parts, which are put together.
template <typename... Name>
void check_tensor(const char* op, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
                  const Name&... name) {
  check(tensor.scalar_type() == dtype, op, ": ", name..., " is ", name_of(tensor.scalar_type()), ", must be ",
        name_of(dtype));
  if (has_shape(tensor, shape)) return;
  std::ostringstream wanted;
  for (int64_t size : shape) wanted << (wanted.tellp() == 0 ? "" : ", ") << size;
  check(false, op, ": ", name..., " must be [", wanted.str(), "]");
}

template <typename... Name>
void check_tensor(const char* op, const std::optional<Tensor>& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Name&... name) {
  if (tensor) check_tensor(op, *tensor, dtype, shape, name...);
}

}  // namespace mmoe
