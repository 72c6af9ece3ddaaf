// CUDA's arithmetic intrinsics that its own headers do not give a host compiler. The fast ones (__expf, __fdividef) are
// exact here: a result on a GPU is off by a few units in the last place, which no test may rely on.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace emulator {

template <typename To, typename From>
To saturate(From value) {
  using Limits = std::numeric_limits<To>;
  if (value != value) return 0;
  // Both bounds as From: the upper one of a wide type rounds up to a power of two, which itself is out of range.
  if (value <= static_cast<From>(Limits::min())) return Limits::min();
  if (value >= static_cast<From>(Limits::max())) return Limits::max();
  return static_cast<To>(value);
}

template <typename T>
T reverse_bits(T value) {
  T reversed = 0;
  for (size_t bit = 0; bit < 8 * sizeof(T); ++bit) reversed |= (value >> bit & 1) << (8 * sizeof(T) - 1 - bit);
  return reversed;
}

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
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<unsigned long long>(bits)); }
inline unsigned __brev(unsigned bits) { return emulator::reverse_bits(bits); }
inline unsigned long long __brevll(unsigned long long bits) { return emulator::reverse_bits(bits); }

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

inline int __float2int_rn(float value) { return emulator::saturate<int>(rintf(value)); }
inline int __float2int_rz(float value) { return emulator::saturate<int>(truncf(value)); }
inline int __float2int_rd(float value) { return emulator::saturate<int>(floorf(value)); }
inline int __float2int_ru(float value) { return emulator::saturate<int>(ceilf(value)); }
inline unsigned __float2uint_rn(float value) { return emulator::saturate<unsigned>(rintf(value)); }
inline unsigned __float2uint_rz(float value) { return emulator::saturate<unsigned>(truncf(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline float __frsqrt_rn(float value) { return static_cast<float>(1.0 / sqrt(static_cast<double>(value))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float value) { return fminf(fmaxf(value, 0.0f), 1.0f); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float __log2f(float value) { return log2f(value); }
