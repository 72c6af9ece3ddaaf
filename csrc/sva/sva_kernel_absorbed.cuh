// sva over absorbed encoders on the device. No torch in this file.
//
// A block of kAbsorbedThreads takes a query at a time, all its heads: the window's features are read once, normalised
// and kept in shared memory as T (x^ below), because every head needs them twice: for its scores, before the softmax,
// and for its weighted sum, after it. A warp's scores are kRows x kKeys of dot products over the channels, so that an
// x^ that was read from shared memory serves two heads, an absorbed query sixteen keys. Blocks live as long as the
// kernel and go from query to query, so that the positions, which all queries share, are read once a block.
//
// Backward: with the weights from lse, a = exp(score - lse), da = grad_pooled . x^ + grad_mass and ds = a (da - sum of
// a * da) / sqrt(D), grad_x^ of a key is the sum over heads of a * grad_pooled + ds * absorbed. The two means over
// channels that LayerNorm's backward needs follow from the dot products at hand, mean(grad_x^ * x^) = sum over heads of
// a * (grad_pooled . x^) + ds * (absorbed . x^) over C, so that grad_x^ is never stored. It takes absorbed and
// grad_pooled a second time and channel by channel, so they too are kept in shared memory.
//
// Bytes moved a query, K keys of C channels, b bytes an element: forward b C (K + 2 H), backward b C (2 K + 4 H), the
// floor (and 2 H once more from the caches, where shared memory holds x^ alone); and K b C for positions, once a block,
// or once a query where sva_heuristics.h found no room for them (three times for rows longer than kHeld channels a
// lane): those reads are of rows that every query shares, so of the caches. Where x^ itself has no place or rows lie
// off the vector grid, a lane takes one element at a time and makes x^ again, from the caches, wherever it is needed.
//
// Occupancy is 25% at most, the two blocks that registers hold; a block has 16 KiB or more of loads under way while it
// reads, and its neighbour computes then. x^, absorbed and grad_pooled of a query of 16 heads, 16 keys and 1024
// channels are 100 KiB in bf16, 196 in fp32, so the backward has one block, 12.5%, on sm_80 in bf16 and on sm_90 in
// fp32. In fp32 on sm_80 even one does not fit: x^ alone stays, in two blocks. Whether that would be faster elsewhere
// too is not known.
//
// Not yet run on a GPU.
#pragma once

#include "sva/sva_kernel_absorbed_parts.cuh"

namespace mmoe::sva {

// Scores to weights, mass and lse, a warp a head. others [B, R, W, H] or null: the log-sum-exp over the keys of other
// encoders, which take part in the softmax; lse [B, R, W, H] is that over the keys of these alone.
template <typename T, bool kStaged>
__device__ void normalise_scores(const Absorbed<T>& args, const Query& query, const float* __restrict__ others,
                                 float* __restrict__ lse, unsigned char* memory) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int head = warp; head < args.queries.heads; head += kAbsorbedWarps) {
    const int of_head = query.index * args.queries.heads + head;
    float* weights = reinterpret_cast<float*>(memory + args.layout.weights) + head * args.layout.row;
    const auto for_keys = [&](int encoder, auto&& body) {
      const Seen<T, kStaged> seen(args, query, encoder, memory);
      for (int key = lane; key < seen.keys(); key += kWarp) body(weights[seen.first_key + key]);
    };
    float top = others == nullptr ? -INFINITY : others[of_head], sum = 0.0f;
    const float joined = top;
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      for_keys(encoder, [&](float& score) { top = max_or_nan(top, score); });
    }
    top = warp_max(top);
    // Where every score is -inf, nothing may be subtracted: -inf - -inf is NaN.
    const float shift = top == -INFINITY ? 0.0f : top;
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      for_keys(encoder, [&](float& score) {
        score = __expf(score - shift);
        sum += score;
      });
    }
    sum = warp_sum(sum);
    if (lane == 0) lse[of_head] = shift + logf(sum);
    const float all = sum + __expf(joined - shift);  // exp(-inf) where there are no others
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      float mass = 0.0f;
      for_keys(encoder, [&](float& weight) {
        weight /= all;
        mass += weight;
      });
      mass = warp_sum(mass);
      if (lane == 0) args.encoder[encoder].mass[static_cast<int64_t>(head) * args.count + query.index] = mass;
    }
  }
}

// <<<blocks, kAbsorbedThreads, AbsorbedLayout::bytes>>>
template <typename T, bool kStaged>
__global__ void __launch_bounds__(kAbsorbedThreads, kAbsorbedBlocks)
    absorbed_kernel(const __grid_constant__ Absorbed<T> args, const float* __restrict__ others,
                    float* __restrict__ lse) {
  using Seen = Seen<T, kStaged>;
  MMOE_DYNAMIC_SHARED(unsigned char, memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int heads = args.queries.heads;
  float* weights = reinterpret_cast<float*>(memory + args.layout.weights);
  stage_positions<T, kStaged>(args, memory);
  for (int index = static_cast<int>(blockIdx.x); index < args.count; index += static_cast<int>(gridDim.x)) {
    const Query query = query_at(args.queries, static_cast<unsigned>(index));
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      normalise_window<T, kStaged>(args, query, encoder, memory);
    }
    __syncthreads();
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      const Seen seen(args, query, encoder, memory);
      const int keys = seen.keys();
      for (int head = warp * kTileRows; head < heads; head += kAbsorbedWarps * kTileRows) {
        const T* first = row_of_head(seen.at.absorbed, seen.at, head, args.count, index);
        const T* second =
            head + 1 < heads ? row_of_head(seen.at.absorbed, seen.at, head + 1, args.count, index) : nullptr;
        const int mine = head + lane / kKeysOfTile;
        const float constant = mine < heads ? seen.at.constants[static_cast<int64_t>(mine) * args.count + index] : 0.0f;
        for (int from = 0; from < keys; from += kKeysOfTile) {
          const float dot = tile_of_dots(args, query, seen, first, second, from, keys, [](int, auto&, auto&) {});
          const int key = from + lane % kKeysOfTile;
          if (mine < heads && key < keys) {
            weights[mine * args.layout.row + seen.first_key + key] = args.scale * (dot + constant);
          }
        }
      }
    }
    __syncthreads();
    normalise_scores<T, kStaged>(args, query, others, lse, memory);
    __syncthreads();
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      const Seen seen(args, query, encoder, memory);
      mix(args, query, seen, (heads + kSums - 1) / kSums, [&](int group, int i) {
        const int head = min(group * kSums + i, heads - 1);
        T* to = row_of_head(seen.at.pooled, seen.at, head, args.count, index);
        return Mixture<T>{weights + head * args.layout.row + seen.first_key, group * kSums + i < heads ? to : nullptr};
      });
    }
    __syncthreads();
  }
}

}  // namespace mmoe::sva
