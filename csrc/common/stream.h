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

MMOE_INLINE Register join(Halves low, Halves high) {
#if defined(__AVX512F__)
  return std::bit_cast<Register>(_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(std::bit_cast<__m256i>(low)),
                                                          std::bit_cast<__m256i>(high), 1));
#elif defined(__AVX2__)
  return std::bit_cast<Register>(_mm256_set_m128i(std::bit_cast<__m128i>(high), std::bit_cast<__m128i>(low)));
#else
  return std::bit_cast<Register>(Vec<uint64_t>{std::bit_cast<uint64_t>(low), std::bit_cast<uint64_t>(high)});
#endif
}

// Stores one line of T, rounded from kVectorsPerLine<T> vectors.
template <bool kStream, typename T>
MMOE_INLINE void store_line_of(T* to, const Vec<Compute<T>> (&values)[kVectorsPerLine<T>]) {
  Line line;
  for (int i = 0; i < kRegistersPerLine; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      line.part[i] = join(round_to_bf16(values[2 * i]), round_to_bf16(values[2 * i + 1]));
    } else {
      line.part[i] = std::bit_cast<Register>(values[i]);
    }
  }
  store_line<kStream>(to, line);
}

}  // namespace mmoe::MMOE_SIMD
