// What permute and unpermute share on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu_types.h"
#include "common/past_caches.h"
#include "permute/permute.h"
#include "permute/permute_simd.h"
#include "unpermute/unpermute_simd.h"

namespace mmoe {

// Tokens are handed to threads in pieces of about this many bytes.
constexpr int64_t kBytesPerTask = 1 << 18;

inline int64_t items_per_task(int64_t bytes_per_item) {
  return 1 + kBytesPerTask / std::max<int64_t>(bytes_per_item, 1);
}

// Once over the index, so that no kernel has to look.
inline void check_rows_inside(const char* what, const Tensor& row_of_slot, int64_t rows) {
  const int32_t* row = row_of_slot.const_data_ptr<int32_t>();
  int32_t largest = -1, smallest = 0;
  for (int64_t slot = 0; slot < row_of_slot.numel(); ++slot) {
    largest = std::max(largest, row[slot]);
    smallest = std::min(smallest, row[slot]);
  }
  check(largest < rows && smallest >= -1, what, ": row_of_slot must be in -1 ... R - 1 with R = ", rows);
}

// Zeros in the rows without a slot.
inline void pad_rows(const Tensor& slot_of_row, void* rows, int64_t row_bytes) {
  const int32_t* slots = slot_of_row.const_data_ptr<int32_t>();
  torch::stable::parallel_for(0, slot_of_row.numel(), items_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    permute_kernels().pad(slots, static_cast<char*>(rows), row_bytes, begin, end);
  });
}

}  // namespace mmoe
