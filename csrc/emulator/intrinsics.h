// CUDA's arithmetic intrinsics that its own headers do not give a host compiler. __expf and, between its bounds,
// __fdividef are exact here: a result on a GPU is off by a few units in the last place, which no test may rely on.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <type_traits>

namespace emulator {

template <typename T>
concept Arithmetic = std::is_arithmetic_v<T>;

}  // namespace emulator

// CUDA's max and min take two types, and of a number and NaN give the number.
template <emulator::Arithmetic A, emulator::Arithmetic B>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return std::max(static_cast<T>(a), static_cast<T>(b));
}
template <emulator::Arithmetic A, emulator::Arithmetic B>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return std::min(static_cast<T>(a), static_cast<T>(b));
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

// Where 2^126 < |b| < 2^128, CUDA's manual has 0, and NaN for an infinite a: the reciprocal is flushed to 0.
inline float __fdividef(float a, float b) {
  const float size = fabsf(b);
  return size > 0x1p126f && size < INFINITY ? a * 0.0f : a / b;
}
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
