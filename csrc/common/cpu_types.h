// Which of an operator's CPU kernels a dtype runs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <tuple>

#include "common/arguments.h"

namespace mmoe {

using torch::headeronly::BFloat16;

// Calls body(kernels, T{}, C{}) with the kernels of the dtype, its type and the type that it is summed in. `kernels`: a
// tuple of those for float32, bfloat16 and float64. `what`: the operator and its argument, for the error.
template <typename Kernels, typename Body>
void for_cpu_type(const Kernels& kernels, ScalarType dtype, const char* what, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(std::get<0>(kernels), float{}, float{});
    case ScalarType::BFloat16:
      return body(std::get<1>(kernels), BFloat16{}, float{});
    case ScalarType::Double:
      return body(std::get<2>(kernels), double{}, double{});
    default:
      check(false, what, " must be float32, bfloat16 or float64 on the CPU");
  }
}

}  // namespace mmoe
