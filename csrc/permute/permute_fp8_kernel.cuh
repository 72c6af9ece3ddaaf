// permute_fp8 on the device: quantise a token once, write it to the row of each of its slots. No torch in this file.
//
// A block per token. 128 / kVector<T> neighbouring lanes (half a warp for 2-byte types) read one block of 128 features
// in 16-byte accesses, agree on its largest magnitude and keep the result, 8 or 4 bytes a lane, in registers; a warp's
// store to a row is one run of 256 or 128 bytes. The scales wait in shared memory, so that a row's d / 128 of them are
// written side by side. Bytes moved, b an element: T d b + R (d + d / 32) and 4 (T k + R); the floor. Quantising first
// and copying then would move T d b + 2 T d + ... for the copy in between.
//
// Not yet run on a GPU.
#pragma once

#include <cfloat>

#include "common/reduce.cuh"
#include "permute/rows.cuh"

namespace mmoe::permute {

constexpr int kFp8Held = 4;
constexpr int kBlock = 128;
constexpr float kFp8Max = 448.0f;

// The e4m3 bits of kVector<T> values: 4 or 8 bytes.
template <typename T>
using Quantised = std::conditional_t<sizeof(T) == 4, unsigned, uint2>;

__device__ __forceinline__ unsigned to_e4m3(float a, float b, float c, float d) {
  const unsigned low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const unsigned high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// d is a multiple of kBlock; where kVectors, x is aligned to 16 bytes. Shared: d / kBlock floats.
// <<<tokens + ceil(rows / kPadRows), row_threads>>>
template <typename T, bool kVectors>
__global__ void __launch_bounds__(512, 2)
    fp8_kernel(const T* __restrict__ x, const int* __restrict__ row_of_slot, const int* __restrict__ slot_of_row,
               int tokens, int rows, int top_k, int width, unsigned char* __restrict__ out,
               float* __restrict__ scales) {
  constexpr int kCount = kVector<T>, kGroup = kBlock / kCount;
  MMOE_DYNAMIC_SHARED(float, token_scales);
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int pieces = width / kCount, blocks = width / kBlock;
  if (block >= tokens) {
    for_each_padding_row(slot_of_row, block - tokens, rows, [&](int64_t row) {
      zero_row(reinterpret_cast<uint4*>(out + row * width), width / 16);
      for (int i = thread; i < blocks; i += threads) scales[row * blocks + i] = 1.0f;
    });
    return;
  }
  const int* rows_of_token = row_of_slot + static_cast<int64_t>(block) * top_k;
  const T* from = x + static_cast<int64_t>(block) * width;
  // Whole warps stay in the loop: they shuffle.
  for (int first = thread; first - thread < pieces; first += kFp8Held * threads) {
    Quantised<T> held[kFp8Held];
#pragma unroll
    for (int i = 0; i < kFp8Held; ++i) {
      const int piece = first + i * threads;
      float values[kCount] = {};
      if (piece < pieces) {
        if constexpr (kVectors) {
          load_vector(from + static_cast<int64_t>(piece) * kCount, values);
        } else {
#pragma unroll
          for (int j = 0; j < kCount; ++j) values[j] = to_float(from[static_cast<int64_t>(piece) * kCount + j]);
        }
      }
      float amax = 0.0f;
#pragma unroll
      for (int j = 0; j < kCount; ++j) amax = max_or_nan(amax, fabsf(values[j]));
#pragma unroll
      for (int reach = kGroup / 2; reach > 0; reach /= 2) {
        amax = max_or_nan(amax, __shfl_xor_sync(kAllLanes, amax, reach));
      }
      // A scale that is not a normal number would lose the block; what is that small rounds to 0 by itself.
      const bool tiny = amax < kFp8Max * FLT_MIN;
      if (piece < pieces && thread % kGroup == 0) token_scales[piece / kGroup] = tiny ? 1.0f : amax / kFp8Max;
      const float factor = tiny ? 1.0f : kFp8Max / amax;
#pragma unroll
      for (int j = 0; j < kCount; ++j) values[j] *= factor;
      if constexpr (kCount == 4) {
        held[i] = to_e4m3(values[0], values[1], values[2], values[3]);
      } else {
        held[i] = make_uint2(to_e4m3(values[0], values[1], values[2], values[3]),
                             to_e4m3(values[4], values[5], values[6], values[7]));
      }
    }
    for_each_row(
        rows_of_token, top_k, rows, [](int) { return 0.0f; },
        [&](int, int64_t row, float) {
          auto* to = reinterpret_cast<Quantised<T>*>(out + row * width);
#pragma unroll
          for (int i = 0; i < kFp8Held; ++i) {
            const int piece = first + i * threads;
            if (piece < pieces) to[piece] = held[i];
          }
        });
  }
  __syncthreads();
  for_each_row(
      rows_of_token, top_k, rows, [](int) { return 0.0f; },
      [&](int, int64_t row, float) {
        for (int i = thread; i < blocks; i += threads) scales[row * blocks + i] = token_scales[i];
      });
}

}  // namespace mmoe::permute
