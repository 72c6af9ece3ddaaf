// The CPU kernels of permute on plain memory; the contract is in permute.h. Rows are bytes here.
#pragma once

#include <cstdint>

#include "common/simd_dispatch.h"

namespace mmoe {

struct PermuteKernels {
  // The rows of the slots of tokens begin..end. `stream`: write past the caches; rows must be aligned to 64 bytes then.
  void (*copy)(const char* x, const int32_t* row_of_slot, char* rows, int64_t top_k, int64_t row_bytes, bool stream,
               int64_t begin, int64_t end);
  // Zeros in those of rows begin..end whose slot is negative.
  void (*pad)(const int32_t* slot_of_row, char* rows, int64_t row_bytes, int64_t begin, int64_t end);
};

MMOE_DECLARE_SIMD(PermuteKernels, permute_kernels)

}  // namespace mmoe
