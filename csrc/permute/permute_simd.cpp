#include "permute/permute_simd.h"

#include "common/stream.h"

namespace mmoe::MMOE_SIMD {
namespace {

// By token, so that x is read from memory once: a token's row stays in the first or second level cache while it is
// written to each of its places.
void copy(const char* x, const int32_t* row_of_slot, char* rows, int64_t top_k, int64_t row_bytes, bool stream,
          int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const char* from = x + token * row_bytes;
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t row = row_of_slot[token * top_k + j];
      if (row < 0) continue;
      char* to = rows + row * row_bytes;
      if (stream) {
        for (int64_t i = 0; i < row_bytes; i += kLineBytes) store_line<true>(to + i, load_line(from + i));
      } else {
        std::memcpy(to, from, row_bytes);
      }
    }
  }
  if (stream) end_stream();
}

void pad(const int32_t* slot_of_row, char* rows, int64_t row_bytes, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (slot_of_row[row] < 0) std::memset(rows + row * row_bytes, 0, row_bytes);
  }
}

}  // namespace

const PermuteKernels permute_kernels{copy, pad};

}  // namespace mmoe::MMOE_SIMD
