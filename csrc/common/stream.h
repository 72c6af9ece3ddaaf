// Whole cache lines written past the caches, for *_simd.cpp. An ordinary store first reads the line it is about to
// overwrite; for a result larger than the caches that is a third of the traffic of a copy.
#pragma once

#include "common/simd.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace mmoe::MMOE_SIMD {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kRegistersPerLine = kLineBytes / kBytes;

using Register = VectorOf<char>::Type;

// 64 bytes in registers.
struct Line {
  Register part[kRegistersPerLine];
};

MMOE_INLINE Line load_line(const void* from) {
  Line line;
  for (int i = 0; i < kRegistersPerLine; ++i) {
    std::memcpy(&line.part[i], static_cast<const char*>(from) + i * kBytes, kBytes);
  }
  return line;
}

// `to` must be aligned to 64 bytes where kStream.
template <bool kStream>
MMOE_INLINE void store_line(void* to, const Line& line) {
  for (int i = 0; i < kRegistersPerLine; ++i) {
    char* place = static_cast<char*>(to) + i * kBytes;
    if constexpr (kStream) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(place), std::bit_cast<__m512i>(line.part[i]));
      continue;
#elif defined(__AVX2__)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(place), std::bit_cast<__m256i>(line.part[i]));
      continue;
#elif defined(__x86_64__)
      _mm_stream_si128(reinterpret_cast<__m128i*>(place), std::bit_cast<__m128i>(line.part[i]));
      continue;
#endif
    }
    std::memcpy(place, &line.part[i], kBytes);
  }
}

// Streamed lines are seen by the other threads after this.
MMOE_INLINE void end_stream() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

// The elements of T in a line, and the vectors that they fill in the type they are computed in.
template <typename T>
constexpr int64_t kPerLine = kLineBytes / static_cast<int64_t>(sizeof(T));
template <typename T>
constexpr int64_t kVectorsPerLine = kPerLine<T> / kLanes<T>;

// One line of T out of kVectorsPerLine<T> vectors.
template <bool kStream, typename T>
MMOE_INLINE void store_line_of(T* to, const Vec<Compute<T>> (&values)[kVectorsPerLine<T>]) {
  if constexpr (!kStream) {
    for (int i = 0; i < kVectorsPerLine<T>; ++i) store(to + i * kLanes<T>, values[i]);
  } else {
    T packed[kPerLine<T>];
    for (int i = 0; i < kVectorsPerLine<T>; ++i) store(packed + i * kLanes<T>, values[i]);
    store_line<true>(to, load_line(packed));
  }
}

}  // namespace mmoe::MMOE_SIMD
