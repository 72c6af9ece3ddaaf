// Vectors for the CPU kernels. A *_simd.cpp includes this file and is compiled once per instruction set (setup.py),
// each time into a namespace of its own, mmoe::MMOE_SIMD; common/simd_dispatch.h chooses among them at run time.
//
// A vector is one register: 64 bytes with AVX-512, 32 with AVX2, 16 without. The order of additions follows from that,
// so results repeat bit for bit on one instruction set, for any number of threads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define MMOE_INLINE inline __attribute__((always_inline))

namespace mmoe::MMOE_SIMD {

using torch::headeronly::BFloat16;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename T, int kSize = kBytes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kSize)));
};
template <typename T>
using Vec = typename VectorOf<T>::Type;

// The type that values of T are computed in, and how many of them a vector holds.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename T>
constexpr int64_t kLanes = kBytes / sizeof(Compute<T>);

using Int = Vec<int32_t>;
using Word = Vec<uint32_t>;
using Halves = VectorOf<uint16_t, kBytes / 2>::Type;

template <typename C>
MMOE_INLINE Vec<C> broadcast(C value) {
  return Vec<C>{} + value;
}

// kLanes<T> elements, at any alignment.
template <typename T>
MMOE_INLINE Vec<Compute<T>> load(const T* from) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    Halves bits;
    std::memcpy(&bits, from, sizeof(bits));
#ifdef __AVX512F__
    // GCC 12 converts 16 values in two halves, and warns of its own header without the mask.
    const Word words = std::bit_cast<Word>(_mm512_maskz_cvtepu16_epi32(0xffff, std::bit_cast<__m256i>(bits)));
#else
    const Word words = __builtin_convertvector(bits, Word);
#endif
    return std::bit_cast<Vec<float>>(words << 16);
  } else {
    Vec<T> values;
    std::memcpy(&values, from, sizeof(values));
    return values;
  }
}

// The first `count` < kLanes<T> elements; the other lanes hold `fill`.
template <typename T>
MMOE_INLINE Vec<Compute<T>> load_first(const T* from, int64_t count, Compute<T> fill) {
  Vec<Compute<T>> values = broadcast(fill);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<Compute<T>>(from[i]);
  return values;
}

// True in the first `count` lanes.
template <typename C>
MMOE_INLINE auto index_below(int64_t count) {
  using Index = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  Vec<Index> index;
  for (int i = 0; i < kBytes / static_cast<int>(sizeof(C)); ++i) index[i] = i;
  return index < static_cast<Index>(count);
}

// Round to nearest even, as torch does; NaN stays NaN. The instruction takes subnormal numbers for 0, as matrix units
// do on bf16 (below 2^-126, far under what a bf16 sum can hold beside anything else).
MMOE_INLINE Halves round_to_bf16(Vec<float> values) {
#ifdef __AVX512BF16__
  return std::bit_cast<Halves>(_mm512_cvtneps_pbh(std::bit_cast<__m512>(values)));
#else
  const Word bits = std::bit_cast<Word>(values);
  const Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Int is_nan = values != values;
  return __builtin_convertvector(is_nan ? Word{} + 0x7fc0 : rounded, Halves);
#endif
}

template <typename T>
MMOE_INLINE void store(T* to, Vec<Compute<T>> values) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Halves bits = round_to_bf16(values);
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    std::memcpy(to, &values, sizeof(values));
  }
}

template <typename T>
MMOE_INLINE void store_first(T* to, Vec<Compute<T>> values, int64_t count) {
  T all[kLanes<T>];
  store(all, values);
  std::memcpy(to, all, count * sizeof(T));
}

// NaN in either operand gives NaN.
template <typename V>
MMOE_INLINE V max(V a, V b) {
  return (a > b) | (a != a) ? a : b;
}

template <typename V>
MMOE_INLINE V abs(V a) {
  using Bits = Vec<std::conditional_t<sizeof(a[0]) == 8, uint64_t, uint32_t>>;
  return std::bit_cast<V>(std::bit_cast<Bits>(a) << 1 >> 1);
}

namespace detail {
template <typename V, typename Combine>
MMOE_INLINE auto fold(V values, Combine combine) {
  constexpr int lanes = sizeof(V) / sizeof(values[0]);
  std::remove_cvref_t<decltype(values[0])> all[lanes];
  std::memcpy(all, &values, sizeof(values));
  for (int reach = lanes / 2; reach > 0; reach /= 2) {
    for (int i = 0; i < reach; ++i) all[i] = combine(all[i], all[i + reach]);
  }
  return all[0];
}
}  // namespace detail

// Over the lanes, always in the same tree.
template <typename V>
MMOE_INLINE auto sum(V values) {
  return detail::fold(values, [](auto a, auto b) { return a + b; });
}

namespace detail {
// Lane i: of x, where bit kReach of i is 0, otherwise of y, the sum of lane i and its partner at that distance.
template <int kReach, typename V, int... kLane>
MMOE_INLINE V add_partners(V x, V y, std::integer_sequence<int, kLane...>) {
  constexpr int lanes = sizeof...(kLane);
  return __builtin_shufflevector(x, y, ((kLane & kReach) ? lanes + kLane : kLane)...) +
         __builtin_shufflevector(x, y, ((kLane & kReach) ? lanes + (kLane ^ kReach) : kLane ^ kReach)...);
}
template <int kCount, typename V>
MMOE_INLINE V sum_each(const V* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    constexpr int lanes = sizeof(V) / sizeof(values[0][0]);
    return add_partners<kCount / 2>(sum_each<kCount / 2>(values), sum_each<kCount / 2>(values + kCount / 2),
                                    std::make_integer_sequence<int, lanes>());
  }
}
}  // namespace detail

// Lane i of the result is the sum over the lanes of values[i]; there are as many values as lanes.
template <typename V>
MMOE_INLINE V sum_each(const V* values) {
  return detail::sum_each<sizeof(V) / sizeof(values[0][0])>(values);
}
template <typename V>
MMOE_INLINE auto max_of(V values) {
  return detail::fold(values, [](auto a, auto b) { return a > b || a != a ? a : b; });
}

// e^x to 2 ulp (Cephes' expf): NaN stays, below -87.3 it is 0, above 88.72 infinity.
MMOE_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> rounder = broadcast(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const Vec<float> bounded = x > 89.0f ? broadcast(89.0f) : x;
  const Vec<float> n = (bounded * 1.44269504088896341f + rounder) - rounder;
  const Vec<float> r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
#ifdef __AVX512F__
  const __mmask16 keeps = _mm512_cmp_ps_mask(std::bit_cast<__m512>(x), _mm512_set1_ps(-87.3365448f), _CMP_NLT_UQ);
  return std::bit_cast<Vec<float>>(_mm512_maskz_scalef_ps(keeps, std::bit_cast<__m512>(p), std::bit_cast<__m512>(n)));
#else
  // 2^n in two factors, so that 2^128 does not overflow before it is multiplied. Where n is NaN, p is too.
  const Int whole = __builtin_convertvector(n, Int);
  const Int half = whole >> 1;
  const Vec<float> first = std::bit_cast<Vec<float>>((half + 127) << 23);
  const Vec<float> second = std::bit_cast<Vec<float>>((whole - half + 127) << 23);
  return x < -87.3365448f ? Vec<float>{} : p * first * second;
#endif
}
MMOE_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace mmoe::MMOE_SIMD
