// router on the device, backward. No torch in this file.
//
// A warp per token, which reads the row of logits once and writes its gradient once. In between the row lies in shared
// memory: the k chosen scores are looked up there by the lanes that hold the slots, and their share of the gradient is
// added there, so that neither needs a scattered access to global memory.
// Bytes moved at T tokens, M columns: 8 T M + 12 T k + 12 T, the floor, and 4 (D + 1) a block.
//
// Occupancy: a row a warp in shared memory; 8 warps a block up to 1364 columns (32 a multiprocessor at 768), 4 at 2304,
// where 12 warps of sm_80 still have 8 loads of 16 bytes a lane in flight.
//
// Not yet run on a GPU.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "router/router_heuristics.h"
#include "router/router_options.h"

namespace mmoe::router {

// Pointers of the backward; the gradients coming in and valid may be null.
struct Backward {
  const float* grad_weights;
  const float* grad_identity;
  const float* grad_group_probs;
  const float* logits;
  const bool* valid;
  const int64_t* ids;
  const float* stats;
  float* grad_logits;
};

template <int kWidth>
__device__ __forceinline__ void load_some(const float* from, float (&values)[kWidth]) {
  if constexpr (kWidth == 4) {
    load_vector(from, values);
  } else {
    values[0] = *from;
  }
}
template <int kWidth>
__device__ __forceinline__ void store_some(float* to, const float (&values)[kWidth]) {
  if constexpr (kWidth == 4) {
    store_vector(to, values);
  } else {
    *to = values[0];
  }
}

// Where kWidth is 4, every row is aligned to 16 bytes. Shared memory: gradients of p by column [room], scores
// [warps, room]; room = columns rounded up to 4.
template <int kWidth, Score kScore>
__global__ void __launch_bounds__(kBackwardWarps* kWarp)
    backward_kernel(Backward tensors, RouterOptions options, int64_t tokens) {
  constexpr int kBatch = 16 / kWidth / 2;  // loads in flight a lane
  constexpr int kStep = kWarp * kWidth;
  MMOE_DYNAMIC_SHARED(float, shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const int columns = static_cast<int>(options.columns), k = static_cast<int>(options.top_k);
  const int room = (columns + 3) / 4 * 4;
  const float scaling = static_cast<float>(options.scaling);
  float* const slopes = shared;
  float* const row = shared + (warp + 1) * room;

  const int groups = static_cast<int>(options.balance_groups), size = static_cast<int>(options.experts) / groups;
  for (int i = static_cast<int>(threadIdx.x); i < columns; i += threads) {
    slopes[i] = tensors.grad_group_probs != nullptr ? tensors.grad_group_probs[min(i / size, groups)] : 0.0f;
  }
  __syncthreads();

  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * warps + warp; token < tokens; token += stride) {
    const float* logits = tensors.logits + token * columns;
    const bool counted = tensors.valid == nullptr || tensors.valid[token];
    const float largest = tensors.stats[2 * token], inverse = tensors.stats[2 * token + 1];

    float mean = 0.0f;  // of the gradients of p, over p
    for (int first = lane * kWidth; first < columns; first += kBatch * kStep) {
      float values[kBatch][kWidth];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * kStep < columns) load_some(logits + first + i * kStep, values[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = first + i * kStep;
        if (column >= columns) break;
        float slope[kWidth];
        load_some(slopes + column, slope);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          values[i][j] =
              kScore == Score::softmax ? expf(values[i][j] - largest) * inverse : 1.0f / (1.0f + expf(-values[i][j]));
          mean += values[i][j] * slope[j];
        }
        store_some(row + column, values[i]);
      }
    }
    mean = counted ? warp_sum(mean) : 0.0f;
    if (kScore == Score::sigmoid) mean *= inverse;
    __syncwarp();

    // The slot of the lane: its score and the gradient that reaches it through weights and identity.
    const bool slot = lane < k;
    const int column = slot ? static_cast<int>(tensors.ids[token * k + lane]) : 0;
    const float score = slot ? row[column] : 0.0f;
    float chosen = 0.0f;
    if (slot) {
      if (tensors.grad_weights != nullptr) chosen = tensors.grad_weights[token * k + lane] * scaling;
      if (counted && tensors.grad_identity != nullptr && column >= options.experts) {
        const float identity = tensors.grad_identity[token];
        if (options.identity == Identity::scaled) chosen += identity * scaling;
        if (options.identity == Identity::unscaled) chosen += identity;
      }
    }
    if (options.renormalize) {
      const float divisor = warp_sum(score) + static_cast<float>(kRenormalizeEpsilon);
      const float shared_part = warp_sum(slot ? score * chosen : 0.0f) / divisor;
      chosen = (chosen - shared_part) / divisor;
    }
    if (kScore == Score::softmax) mean += warp_sum(slot ? score * chosen : 0.0f);

    // softmax: s (slope + chosen - mean); sigmoid: s (1 - s) (chosen + (slope - mean) / sum of s). First without
    // chosen.
    __syncwarp();
    const auto gradient = [&](float s, float slope) {
      const float centred = (counted ? slope : 0.0f) - mean;
      return kScore == Score::softmax ? s * centred : s * (1.0f - s) * (centred * inverse);
    };
    for (int at = lane * kWidth; at < columns; at += kStep) {
      float values[kWidth], slope[kWidth];
      load_some(row + at, values);
      load_some(slopes + at, slope);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = gradient(values[j], slope[j]);
      store_some(row + at, values);
    }
    __syncwarp();
    if (slot) row[column] += (kScore == Score::softmax ? score : score * (1.0f - score)) * chosen;
    __syncwarp();
    using Piece = PieceOf<float, kWidth == 4>;
    auto* grad = reinterpret_cast<Piece*>(tensors.grad_logits + token * columns);
    for (int at = lane * kWidth; at < columns; at += kStep) {
      float values[kWidth];
      load_some(row + at, values);
      store_piece(grad + at / kWidth, pack_piece<float, kWidth == 4>(values));
    }
    __syncwarp();
  }
}

}  // namespace mmoe::router
