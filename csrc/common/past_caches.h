// When a result is written past the caches (common/stream.h): for host code.
#pragma once

#include <cstdint>

namespace mmoe {

// A result of more bytes does not stay in the caches for whoever reads it next.
constexpr int64_t kPastCaches = int64_t{1} << 24;
constexpr int64_t kCacheLine = 64;

// Whether a result of `rows` rows of `row_bytes` from `base` on is; only whole cache lines can be.
inline bool streams(const void* base, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes > kPastCaches && row_bytes % kCacheLine == 0 &&
         reinterpret_cast<uintptr_t>(base) % kCacheLine == 0;
}

}  // namespace mmoe
