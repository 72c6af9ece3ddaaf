// sva over projected encoders on the device. No torch in this file.
//
// A warp takes a query and as many heads as its lanes hold: kLanes lanes share a head, each with 16 bytes of it, so
// that the warp reads a whole stretch of a row, 512 bytes where kLanes vectors are just a head. The grids are read
// where they lie: the cells of a window are found by index, which is what the operator saves over one that re-arranges
// them.
//
// Forward: keys come kTile at a time, K and V together, through an online softmax; nothing but out and lse is written.
// Backward: the weights follow from lse, so one loop over the keys reads K and V once and has sum a * da, from which
// grad_q follows at its end: sum a * (da - delta) * k = sum a * da * k - delta * sum a * k. A second loop writes the
// gradients of K and V from each key's a and da, which wait in shared memory. Windows are disjoint: no atomics.
//
// Absorbed encoders share the softmax. Then a first pass that stops at lse (at delta, in the backward) tells them what
// the projected keys add up to, and the full pass comes after with theirs as `others`: one key more of that score and
// no value. Bytes moved a query, K keys of b bytes an element, H*D = C: forward b C (2 + 2 K) + 4 H, backward
// b C (3 + 4 K) + 4 H, both the floor; beside absorbed encoders b C (1 + K) and b C (2 + 2 K) more.
//
// Not yet run on a GPU.
#pragma once

#include "common/vector.cuh"
#include "sva/sva_heuristics.h"
#include "sva/sva_kernel.cuh"

namespace mmoe::sva {

constexpr int kProjectedThreads = 128;  // at most; sva_heuristics.h may take fewer
constexpr int kProjectedBlocks = 8;     // a multiprocessor: at most 64 registers a thread, half of its warps

template <typename T>
struct ProjectedEncoder {
  const T* keys;
  const T* values;
  T* grad_keys;  // contiguous; null in the forward
  T* grad_values;
  const bool* mask;                                        // or null
  int64_t keys_of_image, values_of_image, cells_of_image;  // strides between images of keys, values and mask
  int window;
};

template <typename T>
struct Projected {
  ProjectedEncoder<T> encoder[kMostEncoders];
  int encoders;
  Queries queries;
  int groups;      // warps a query takes, see ProjectedLaunch
  unsigned units;  // queries * groups
  float scale;
  const T* q;
};

// The part of a query's heads that a lane holds.
template <typename T, int kLanes, bool kVectors>
struct Slice {
  static constexpr int kCount = kVectors ? kVector<T> : kScalarsPerLane;
  static constexpr int kStep = kVectors ? 1 : kLanes;

  struct Raw {
    uint4 vector;
    T scalar[kVectors ? 1 : kCount];
  };

  int head;      // which may lie past the last
  int part;      // of kLanes
  int first;     // the lane's first element in a row
  int elements;  // how many elements the head has from there on; none past the last head

  __device__ __forceinline__ Slice(const Queries& queries, int group) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    head = group * (kWarp / kLanes) + lane / kLanes;
    part = lane % kLanes;
    const int skipped = part * (kVectors ? kCount : 1);
    first = head * queries.width + skipped;
    elements = head < queries.heads ? queries.width - skipped : 0;
  }

  __device__ __forceinline__ bool leads() const { return part == 0 && elements > 0; }

  __device__ __forceinline__ Raw read(const T* row) const {
    Raw raw;
    if constexpr (kVectors) {
      raw.vector = elements > 0 ? load16(row + first) : make_uint4(0, 0, 0, 0);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        raw.scalar[i] = i * kStep < elements ? row[first + i * kStep] : from_float<T>(0.0f);
      }
    }
    return raw;
  }

  static __device__ __forceinline__ Raw nothing() {
    Raw raw;
    if constexpr (kVectors) {
      raw.vector = make_uint4(0, 0, 0, 0);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) raw.scalar[i] = from_float<T>(0.0f);
    }
    return raw;
  }

  static __device__ __forceinline__ void unpack(const Raw& raw, float (&values)[kCount]) {
    if constexpr (kVectors) {
      unpack_vector<T>(raw.vector, values);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = to_float(raw.scalar[i]);
    }
  }

  __device__ __forceinline__ void write(T* row, const float (&values)[kCount]) const {
    if constexpr (kVectors) {
      if (elements > 0) store_vector(row + first, values);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i * kStep < elements) row[first + i * kStep] = from_float<T>(values[i]);
      }
    }
  }

  // The head's dot product, in each of its lanes.
  static __device__ __forceinline__ float dot(const float (&a)[kCount], const Raw& raw) {
    float b[kCount], sum = 0.0f;
    unpack(raw, b);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum = fmaf(a[i], b[i], sum);
#pragma unroll
    for (int reach = kLanes / 2; reach > 0; reach /= 2) sum += __shfl_xor_sync(kAllLanes, sum, reach);
    return sum;
  }
};

// Walks the keys of a query that count, encoder by encoder. For a whole warp.
template <typename T>
struct Keys {
  const Projected<T>& args;
  const Query& query;
  int encoder = -1;
  unsigned long long left = 0;
  int64_t row = 0;  // of the image's grid

  __device__ __forceinline__ bool next() {
    while (left == 0) {
      if (encoder + 1 >= args.encoders) return false;
      ++encoder;
      const ProjectedEncoder<T>& at = args.encoder[encoder];
      left = valid_cells(args.queries, query, at.window, at.mask, at.cells_of_image);
    }
    row = row_of_cell(args.queries, query, args.encoder[encoder].window, __ffsll(static_cast<long long>(left)) - 1);
    left &= left - 1;
    return true;
  }
  __device__ __forceinline__ const T* key(int64_t channels) const {
    return args.encoder[encoder].keys + query.image * args.encoder[encoder].keys_of_image + row * channels;
  }
  __device__ __forceinline__ const T* value(int64_t channels) const {
    return args.encoder[encoder].values + query.image * args.encoder[encoder].values_of_image + row * channels;
  }
};

// others [B, R, W, H] or null: the log-sum-exp over the keys of other encoders; lse covers both. Without out, values
// are not read. <<<ceil(units / warps), warps * kWarp>>>
template <typename T, int kLanes, bool kVectors>
__global__ void __launch_bounds__(kProjectedThreads, kProjectedBlocks)
    projected_kernel(const __grid_constant__ Projected<T> args, const float* __restrict__ others, T* __restrict__ out,
                     float* __restrict__ lse) {
  using Slice = Slice<T, kLanes, kVectors>;
  constexpr int kTile = kVectors ? 2 : 1;
  const unsigned unit = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (unit >= args.units) return;
  const Query query = query_at(args.queries, unit / static_cast<unsigned>(args.groups));
  const Slice slice(args.queries, static_cast<int>(unit % static_cast<unsigned>(args.groups)));
  const int64_t channels = static_cast<int64_t>(args.queries.heads) * args.queries.width;
  const int64_t of_head = query.index * args.queries.heads + slice.head;

  float q[Slice::kCount];
  Slice::unpack(slice.read(args.q + query.index * channels), q);
#pragma unroll
  for (int i = 0; i < Slice::kCount; ++i) q[i] *= args.scale;
  // A running maximum, and sums of exp(score - maximum) and of that times v.
  const bool joined = others != nullptr && slice.elements > 0;
  float top = joined ? others[of_head] : -INFINITY, sum = joined ? 1.0f : 0.0f;
  float total[Slice::kCount] = {};

  Keys<T> keys{args, query};
  bool more = true;
  while (more) {
    typename Slice::Raw k[kTile], v[kTile];
    bool here[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      here[i] = keys.next();
      k[i] = here[i] ? slice.read(keys.key(channels)) : Slice::nothing();
      v[i] = here[i] && out != nullptr ? slice.read(keys.value(channels)) : Slice::nothing();
    }
    more = here[kTile - 1];
    float score[kTile], higher = top;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      score[i] = Slice::dot(q, k[i]);
      if (!here[i]) score[i] = -INFINITY;
      higher = fmaxf(higher, score[i]);
    }
    // While every score is -inf, nothing may be subtracted: -inf - -inf is NaN.
    const float shift = higher == -INFINITY ? 0.0f : higher;
    const float old = __expf(top - shift);
    top = higher;
    sum *= old;
#pragma unroll
    for (int j = 0; j < Slice::kCount; ++j) total[j] *= old;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const float weight = __expf(score[i] - shift);
      float value[Slice::kCount];
      Slice::unpack(v[i], value);
      sum += weight;
#pragma unroll
      for (int j = 0; j < Slice::kCount; ++j) total[j] = fmaf(weight, value[j], total[j]);
    }
  }
  if (slice.leads()) lse[of_head] = top + logf(sum);
  if (out == nullptr) return;
#pragma unroll
  for (int j = 0; j < Slice::kCount; ++j) total[j] /= sum;
  slice.write(out + query.index * channels, total);
}

// lse [B, R, W, H] of the forward, over all encoders; others [B, R, W, H] or null: sum of a * da over the keys of other
// encoders. Where grad_q is null, stops at delta: the same sum over the keys of these.
// <<<ceil(units / warps), warps * kWarp, ProjectedLaunch::shared_bytes>>>
template <typename T, int kLanes, bool kVectors>
__global__ void __launch_bounds__(kProjectedThreads, kProjectedBlocks)
    projected_backward_kernel(const __grid_constant__ Projected<T> args, const T* __restrict__ grad_out,
                              const float* __restrict__ lse, const float* __restrict__ others, int keys_of_query,
                              T* __restrict__ grad_q, float* __restrict__ delta_of_head) {
  using Slice = Slice<T, kLanes, kVectors>;
  constexpr int kTile = kVectors ? 2 : 1;
  constexpr int kHeads = kWarp / kLanes;
  MMOE_DYNAMIC_SHARED(float2, kept);  // [warps][keys_of_query][kHeads]: a and da of the keys that count
  const unsigned unit = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (unit >= args.units) return;
  const Query query = query_at(args.queries, unit / static_cast<unsigned>(args.groups));
  const Slice slice(args.queries, static_cast<int>(unit % static_cast<unsigned>(args.groups)));
  const int64_t channels = static_cast<int64_t>(args.queries.heads) * args.queries.width;
  const int64_t of_head = query.index * args.queries.heads + slice.head;
  const int in_warp = static_cast<int>(threadIdx.x) % kWarp / kLanes;
  float2* of_key = kept + static_cast<int64_t>(threadIdx.x / kWarp) * keys_of_query * kHeads + in_warp;

  float q[Slice::kCount], grad[Slice::kCount];
  Slice::unpack(slice.read(args.q + query.index * channels), q);
  Slice::unpack(grad_out == nullptr ? Slice::nothing() : slice.read(grad_out + query.index * channels), grad);
#pragma unroll
  for (int i = 0; i < Slice::kCount; ++i) q[i] *= args.scale;
  const float total = slice.elements > 0 ? lse[of_head] : 0.0f;
  float delta = others != nullptr && slice.elements > 0 ? others[of_head] : 0.0f;
  float sum_ak[Slice::kCount] = {}, sum_adak[Slice::kCount] = {};

  Keys<T> keys{args, query};
  int done = 0;
  bool more = true;
  while (more) {
    typename Slice::Raw k[kTile], v[kTile];
    bool here[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      here[i] = keys.next();
      k[i] = here[i] ? slice.read(keys.key(channels)) : Slice::nothing();
      v[i] = here[i] ? slice.read(keys.value(channels)) : Slice::nothing();
    }
    more = here[kTile - 1];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const float score = Slice::dot(q, k[i]), slope = Slice::dot(grad, v[i]);
      const float weight = here[i] ? __expf(score - total) : 0.0f;
      if (here[i] && slice.part == 0) of_key[done * kHeads] = make_float2(weight, slope);
      done += here[i] ? 1 : 0;
      delta = fmaf(weight, slope, delta);
      float key[Slice::kCount];
      Slice::unpack(k[i], key);
#pragma unroll
      for (int j = 0; j < Slice::kCount; ++j) {
        sum_ak[j] = fmaf(weight, key[j], sum_ak[j]);
        sum_adak[j] = fmaf(weight * slope, key[j], sum_adak[j]);
      }
    }
  }
  if (grad_q == nullptr) {
    if (slice.leads()) delta_of_head[of_head] = delta;
    return;
  }
#pragma unroll
  for (int j = 0; j < Slice::kCount; ++j) sum_adak[j] = args.scale * fmaf(-delta, sum_ak[j], sum_adak[j]);
  slice.write(grad_q + query.index * channels, sum_adak);

  __syncwarp();
  done = 0;
  for (int encoder = 0; encoder < args.encoders; ++encoder) {
    const ProjectedEncoder<T>& at = args.encoder[encoder];
    const int cells = at.window * at.window;
    const unsigned long long valid = valid_cells(args.queries, query, at.window, at.mask, at.cells_of_image);
    const int64_t first_row = static_cast<int64_t>(query.image) * args.queries.rows * args.queries.columns * cells;
    for (int cell = 0; cell < cells; ++cell) {
      float weight = 0.0f, slope = 0.0f;
      if (valid >> cell & 1) {
        const float2 pair = of_key[done * kHeads];
        weight = pair.x;
        slope = weight * (pair.y - delta);
        ++done;
      }
      float grad_key[Slice::kCount], grad_value[Slice::kCount];
#pragma unroll
      for (int j = 0; j < Slice::kCount; ++j) {
        grad_key[j] = slope * q[j];  // q holds the scale
        grad_value[j] = weight * grad[j];
      }
      const int64_t row = first_row + row_of_cell(args.queries, query, at.window, cell);
      slice.write(at.grad_keys + row * channels, grad_key);
      slice.write(at.grad_values + row * channels, grad_value);
    }
  }
}

}  // namespace mmoe::sva
