// router on the device, forward. No torch in this file.
//
// A warp per token; the row lies in registers, kVectors of four columns a lane, so that the logits are read once. The k
// best are found without sorting the row: the k-th highest of 64 (k <= 16: 32) maxima over sets of columns is a bound
// that at least k columns reach and hardly more do; these candidates are listed in shared memory and sorted across the
// lanes. Where more than the list holds reach it (ties), the bound is made exact by bisection over (key, column).
// (k extractions by warp argmax would pass over the lane's columns k times; this passes twice, whatever k is.)
//
// Blocks stay: the bias is read once a block; the tokens' counts and probability sums are kept in shared memory, the
// sums a row a warp, and written once a block. sum_kernel adds the blocks in their order, so results repeat bit for bit
// on one device: the grid depends on the shapes and the device alone.
//
// Bytes moved at T tokens, M columns, B blocks: 4 T M + 12 T k + 12 T + B (4 M + 2 * 4 M + 8 (D + 1)) + 8 M; all but
// the term of the blocks is the floor, and that is 4% at T = 8192, M = 768, 132 blocks.
//
// Occupancy: 32 warps of 64 registers up to 768 columns, 50%. Above, a lane holds up to 72 columns and a multiprocessor
// 8 warps, 12.5%, but each has its whole row, up to 9 KB, in flight: more than latency times bandwidth asks for.
//
// Not yet run on a GPU.
#pragma once

#include "router/router_select.cuh"

namespace mmoe::router {

// Pointers of the forward; valid may be null.
struct Forward {
  const float* logits;
  const float* bias;
  const bool* valid;
  int64_t* ids;
  float* weights;
  float* identity_weight;
  float* stats;
  int* block_counts;   // [blocks, columns]
  float* block_probs;  // [blocks, balance_groups + 1]
};

// Shared memory: bias [room], counts [room], sums [warps, room], lists [warps]; room = 128 kVectors.
template <int kVectors, bool kAligned>
__global__ void __launch_bounds__(most_threads(kVectors), 1)
    forward_kernel(Forward tensors, RouterOptions options, int64_t tokens) {
  using Own = Row<kVectors, kAligned>;
  MMOE_DYNAMIC_SHARED(float, shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const int columns = static_cast<int>(options.columns), k = static_cast<int>(options.top_k);
  float* const bias = shared;
  int* const counts = reinterpret_cast<int*>(bias + Own::kRoom);
  float* const sums = reinterpret_cast<float*>(counts + Own::kRoom);
  float* const own_sums = sums + warp * Own::kRoom;
  unsigned* const lists = reinterpret_cast<unsigned*>(sums + warps * Own::kRoom) + warp * 3 * kListed;
  const Listed list{lists, reinterpret_cast<int*>(lists + kListed), reinterpret_cast<float*>(lists + 2 * kListed)};

  for (int i = static_cast<int>(threadIdx.x); i < Own::kRoom; i += threads) {
    bias[i] = i < columns ? tensors.bias[i] : 0.0f;
    counts[i] = 0;
  }
  for (int i = static_cast<int>(threadIdx.x); i < warps * Own::kRoom; i += threads) sums[i] = 0.0f;
  __syncthreads();

  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * warps + warp; token < tokens; token += stride) {
    Own row;
    row.lane = lane;
    row.load(tensors.logits + token * columns, columns);
    const bool counted = tensors.valid == nullptr || tensors.valid[token];
    const float2 stats = score_row(row, options.score);
    if (lane == 0) {
      tensors.stats[2 * token] = stats.x;
      tensors.stats[2 * token + 1] = stats.y;
    }
    if (counted) row.add_to_shared(own_sums, options.score == Score::softmax ? 1.0f : stats.y);

    const Eligible eligible = eligible_of(row, bias, options);
    int column;
    float share;
    select(row, bias, eligible, k, list, column, share);

    const bool slot = lane < k;
    if (options.renormalize) share /= warp_sum(slot ? share : 0.0f) + static_cast<float>(kRenormalizeEpsilon);
    const float weight = share * static_cast<float>(options.scaling);
    float identity = options.identity == Identity::scaled ? weight : options.identity == Identity::unscaled ? share : 1;
    identity = warp_sum(slot && column >= options.experts ? identity : 0.0f);
    if (slot) {
      tensors.ids[token * k + lane] = column;
      tensors.weights[token * k + lane] = weight;
      if (counted) atomicAdd(&counts[column], 1);
    }
    if (lane == 0) {
      tensors.identity_weight[token] = counted && options.identity != Identity::drop ? identity : 0.0f;
    }
  }
  __syncthreads();

  for (int i = static_cast<int>(threadIdx.x); i < columns; i += threads) {
    tensors.block_counts[static_cast<int64_t>(blockIdx.x) * columns + i] = counts[i];
    float total = sums[i];
    for (int other = 1; other < warps; ++other) total += sums[other * Own::kRoom + i];
    sums[i] = total;
  }
  __syncthreads();
  const int groups = static_cast<int>(options.balance_groups), size = static_cast<int>(options.experts) / groups;
  for (int group = warp; group <= groups; group += warps) {
    const int last = group < groups ? (group + 1) * size : columns;
    float total = 0.0f;
    for (int i = group * size + lane; i < last; i += kWarp) total += sums[i];
    total = warp_sum(total);
    if (lane == 0) tensors.block_probs[static_cast<int64_t>(blockIdx.x) * (groups + 1) + group] = total;
  }
}

constexpr int kSumThreads = 256;
constexpr int kSumRuns = kSumThreads / kWarp;

// counts and group_probs out of the blocks', in an order that the number of blocks fixes. A block adds 32 columns, each
// of its warps a run of the blocks; the last ones add a group a warp.
// <<<ceil(columns / 32) + ceil(groups / kSumRuns), kSumThreads>>>; groups with that of the zero experts.
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const int* __restrict__ block_counts, const float* __restrict__ block_probs, int blocks, int columns,
               int groups, int64_t* __restrict__ counts, float* __restrict__ probs) {
  MMOE_SHARED(int, partial, kSumThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int of_counts = (columns + kWarp - 1) / kWarp;
  if (static_cast<int>(blockIdx.x) >= of_counts) {
    const int group = (static_cast<int>(blockIdx.x) - of_counts) * kSumRuns + warp;
    if (group >= groups) return;
    float total = 0.0f;
    for (int block = lane; block < blocks; block += kWarp) total += block_probs[block * groups + group];
    total = warp_sum(total);
    if (lane == 0) probs[group] = total;
    return;
  }
  const int column = static_cast<int>(blockIdx.x) * kWarp + lane;
  int total = 0;
  if (column < columns) {
    for (int block = warp; block < blocks; block += kSumRuns) total += block_counts[block * columns + column];
  }
  partial[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int run = 1; run < kSumRuns; ++run) total += partial[run * kWarp + lane];
  counts[column] = total;
}

}  // namespace mmoe::router
