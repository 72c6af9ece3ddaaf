// The CPU kernels of unpermute on plain memory, a range of tokens a call; the contract is in unpermute.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <tuple>

#include "common/simd_dispatch.h"

namespace mmoe {

template <typename T, typename C>
struct UnpermuteOf {
  // out of tokens begin..end. Weights may be null for 1 each, x and identity for no identity term.
  void (*forward)(const T* rows, const int32_t* row_of_slot, const C* weights, const T* x, const C* identity, T* out,
                  int64_t top_k, int64_t width, int64_t begin, int64_t end);
  // The gradients of tokens begin..end and of their slots' rows. `stream`: grad_rows is written past the caches; its
  // rows must be aligned to 64 bytes then.
  void (*backward)(const T* grad_out, const T* rows, const int32_t* row_of_slot, const C* weights, const T* x,
                   const C* identity, T* grad_rows, C* grad_weights, T* grad_x, C* grad_identity, int64_t top_k,
                   int64_t width, bool stream, int64_t begin, int64_t end);
};

using UnpermuteKernels =
    std::tuple<UnpermuteOf<float, float>, UnpermuteOf<torch::headeronly::BFloat16, float>, UnpermuteOf<double, double>>;

MMOE_DECLARE_SIMD(UnpermuteKernels, unpermute_kernels)

}  // namespace mmoe
