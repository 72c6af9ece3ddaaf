// Vector accesses of 16 bytes and conversions between storage types (float, bf16, fp16) and fp32.
#pragma once

#include <type_traits>

#include "common/device.cuh"

namespace mmoe {

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ __forceinline__ float to_float(__half value) {
  return __half2float(value);
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  return static_cast<T>(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float(float value) {
  return __float2half_rn(value);
}

// Elements of T in a 16-byte access.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// One access of 16 bytes. The pointer must be aligned to 16 bytes; the emulator checks that.
__device__ __forceinline__ uint4 load16(const void* from) {
#ifdef MMOE_EMULATED
  return emulator::load<uint4>(from);
#else
  return *static_cast<const uint4*>(from);
#endif
}
__device__ __forceinline__ void store16(void* to, uint4 value) {
#ifdef MMOE_EMULATED
  emulator::store(to, value);
#else
  *static_cast<uint4*>(to) = value;
#endif
}

// The kVector<T> elements in 16 bytes, as fp32.
template <typename T>
__device__ __forceinline__ void unpack_vector(uint4 raw, float (&values)[kVector<T>]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words[i]);
    } else if constexpr (sizeof(T) == 2) {
      const unsigned short half = static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)));
      T element;
      static_assert(sizeof(element) == sizeof(half));
      memcpy(&element, &half, sizeof(half));
      values[i] = to_float(element);
    }
  }
}

// kVector<T> elements at `from`, aligned to 16 bytes, as fp32.
template <typename T>
__device__ __forceinline__ void load_vector(const T* from, float (&values)[kVector<T>]) {
  unpack_vector<T>(load16(from), values);
}

// kVector<T> fp32 values, rounded to nearest even, in 16 bytes.
template <typename T>
__device__ __forceinline__ uint4 pack_vector(const float (&values)[kVector<T>]) {
  unsigned words[4];
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    if constexpr (sizeof(T) == 4) {
      words[word] = __float_as_uint(values[word]);
    } else {
      const T low = from_float<T>(values[2 * word]);
      const T high = from_float<T>(values[2 * word + 1]);
      unsigned short bits[2];
      memcpy(&bits[0], &low, 2);
      memcpy(&bits[1], &high, 2);
      words[word] = bits[0] | static_cast<unsigned>(bits[1]) << 16;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Stores kVector<T> fp32 values, rounded to nearest even, at `to`, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void store_vector(T* to, const float (&values)[kVector<T>]) {
  store16(to, pack_vector<T>(values));
}

// A row is read and written in pieces: 16 bytes, or single elements where rows are off the 16-byte grid.
template <typename T, bool kVectors>
using PieceOf = std::conditional_t<kVectors, uint4, T>;
template <typename T, bool kVectors>
constexpr int kPiece = kVectors ? kVector<T> : 1;

// From global memory that the kernel does not write. A plain load of 16 bytes nvcc 13.0 may split in two for sm_100.
template <typename Piece>
__device__ __forceinline__ Piece load_piece(const Piece* from) {
  if constexpr (sizeof(Piece) == 16) {
    return __ldg(from);
  } else {
    return *from;
  }
}

// To global memory. In a plain assignment nvcc 13.0 splits the 16 bytes of a sum into four stores.
template <typename Piece>
__device__ __forceinline__ void store_piece(Piece* to, Piece value) {
  if constexpr (sizeof(Piece) == 16) {
#ifdef MMOE_EMULATED
    store16(to, value);
#else
    __stwb(to, value);
#endif
  } else {
    *to = value;
  }
}

// The elements of T in a piece, as fp32, and back.
template <typename T, bool kVectors>
__device__ __forceinline__ void unpack_piece(PieceOf<T, kVectors> piece, float (&values)[kPiece<T, kVectors>]) {
  if constexpr (kVectors) {
    unpack_vector<T>(piece, values);
  } else {
    values[0] = to_float(piece);
  }
}
template <typename T, bool kVectors>
__device__ __forceinline__ PieceOf<T, kVectors> pack_piece(const float (&values)[kPiece<T, kVectors>]) {
  if constexpr (kVectors) {
    return pack_vector<T>(values);
  } else {
    return from_float<T>(values[0]);
  }
}

}  // namespace mmoe
