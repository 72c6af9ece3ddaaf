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
#include "sva/sva_kernel.cuh"

namespace mmoe::sva {

constexpr int kProjectedThreads = 128;  // at most; sva_heuristics.h may take fewer
// Of a multiprocessor: at most 64 registers a thread and half of its warps, or 96 and 5/16 of them. The backward's two
// sums beside q and grad_out need the registers; its warps still have 40 KiB of loads under way at a time, where 3.4
// TB/s times 0.7 us is 18 KiB for each of 132 multiprocessors.
constexpr int kForwardBlocks = 8;
constexpr int kBackwardBlocks = 5;

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
  ProjectedEncoder<T> encoder[kSvaEncoders];
  int encoders;
  Queries queries;
  int groups;      // warps a query takes, see ProjectedLaunch
  unsigned units;  // queries * groups
  float scale;
  const T* q;
};

// The part of a query's heads that a lane holds: one vector, or every kLanes-th element of a head.
template <typename T, int kWidth, bool kVectors>
struct Slice {
  static constexpr int kCount = kVectors ? kVector<T> : kWidth / kWarp;
  static constexpr int kLanes = kWidth / kCount;
  static constexpr int kHeads = kWarp / kLanes;  // of a warp

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
    head = group * kHeads + lane / kLanes;
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
        raw.scalar[i] = i * kLanes < elements ? row[first + i * kLanes] : from_float<T>(0.0f);
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
        if (i * kLanes < elements) row[first + i * kLanes] = from_float<T>(values[i]);
      }
    }
  }

  // The head's dot product, in each of its lanes.
  static __device__ __forceinline__ float dot(const Raw& left, const Raw& right) {
    float a[kCount], b[kCount], sum = 0.0f;
    unpack(left, a);
    unpack(right, b);
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
  int row = 0;  // of the image's grid

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
  __device__ __forceinline__ const T* key(int channels) const {
    const ProjectedEncoder<T>& at = args.encoder[encoder];
    return at.keys + query.image * at.keys_of_image + static_cast<int64_t>(row) * channels;
  }
  __device__ __forceinline__ const T* value(int channels) const {
    const ProjectedEncoder<T>& at = args.encoder[encoder];
    return at.values + query.image * at.values_of_image + static_cast<int64_t>(row) * channels;
  }
};

// others [B, R, W, H] or null: the log-sum-exp over the keys of other encoders; lse covers both. Without out, values
// are not read. <<<ceil(units / warps), warps * kWarp>>>
template <typename T, int kWidth, bool kVectors>
__global__ void __launch_bounds__(kProjectedThreads, kForwardBlocks)
    projected_kernel(const __grid_constant__ Projected<T> args, const float* __restrict__ others, T* __restrict__ out,
                     float* __restrict__ lse) {
  using Slice = Slice<T, kWidth, kVectors>;
  constexpr int kTile = kVectors ? 2 : 1;
  const unsigned unit = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (unit >= args.units) return;
  const Query query = query_at(args.queries, unit / static_cast<unsigned>(args.groups));
  const Slice slice(args.queries, static_cast<int>(unit % static_cast<unsigned>(args.groups)));
  const int channels = args.queries.heads * args.queries.width;
  const int64_t row = query.index * static_cast<int64_t>(channels);  // of q and out
  const int of_head = query.index * args.queries.heads + slice.head;

  const typename Slice::Raw q = slice.read(args.q + row);
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
      score[i] = args.scale * Slice::dot(q, k[i]);
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
  slice.write(out + row, total);
}

// lse [B, R, W, H] of the forward, over all encoders; others [B, R, W, H] or null: sum of a * da over the keys of other
// encoders. Where grad_q is null, stops at delta: the same sum over the keys of these.
// <<<ceil(units / warps), warps * kWarp, ProjectedLaunch::shared_bytes>>>
template <typename T, int kWidth, bool kVectors>
__global__ void __launch_bounds__(kProjectedThreads, kBackwardBlocks)
    projected_backward_kernel(const __grid_constant__ Projected<T> args, const T* __restrict__ grad_out,
                              const float* __restrict__ lse, const float* __restrict__ others, int keys_of_query,
                              T* __restrict__ grad_q, float* __restrict__ delta_of_head) {
  using Slice = Slice<T, kWidth, kVectors>;
  constexpr int kTile = kVectors ? 2 : 1;
  MMOE_DYNAMIC_SHARED(float2, kept);  // [warps][keys_of_query][heads of a warp]: a and da of the keys that count
  const unsigned unit = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (unit >= args.units) return;
  const Query query = query_at(args.queries, unit / static_cast<unsigned>(args.groups));
  const Slice slice(args.queries, static_cast<int>(unit % static_cast<unsigned>(args.groups)));
  const int channels = args.queries.heads * args.queries.width;
  const int64_t row = query.index * static_cast<int64_t>(channels);  // of q and out
  const int of_head = query.index * args.queries.heads + slice.head;
  const int in_warp = static_cast<int>(threadIdx.x) % kWarp / Slice::kLanes;
  float2* of_key = kept + static_cast<int64_t>(threadIdx.x / kWarp) * keys_of_query * Slice::kHeads + in_warp;

  const typename Slice::Raw q = slice.read(args.q + row);
  const typename Slice::Raw grad = grad_out == nullptr ? Slice::nothing() : slice.read(grad_out + row);
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
      const float score = args.scale * Slice::dot(q, k[i]), slope = Slice::dot(grad, v[i]);
      const float weight = here[i] ? __expf(score - total) : 0.0f;
      if (here[i] && slice.part == 0) of_key[done * Slice::kHeads] = make_float2(weight, slope);
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
  slice.write(grad_q + row, sum_adak);

  __syncwarp();
  done = 0;
  for (int encoder = 0; encoder < args.encoders; ++encoder) {
    const ProjectedEncoder<T>& at = args.encoder[encoder];
    const int cells = at.window * at.window;
    const unsigned long long valid = valid_cells(args.queries, query, at.window, at.mask, at.cells_of_image);
    const int64_t first_row = static_cast<int64_t>(query.image) * args.queries.rows * args.queries.columns * cells;
#pragma unroll 1
    for (int cell = 0; cell < cells; ++cell) {
      float weight = 0.0f, slope = 0.0f;
      if (valid >> cell & 1) {
        const float2 pair = of_key[done * Slice::kHeads];
        weight = pair.x;
        slope = args.scale * weight * (pair.y - delta);
        ++done;
      }
      float grad_key[Slice::kCount], grad_value[Slice::kCount];
      Slice::unpack(q, grad_key);
      Slice::unpack(grad, grad_value);
#pragma unroll
      for (int j = 0; j < Slice::kCount; ++j) {
        grad_key[j] *= slope;
        grad_value[j] *= weight;
      }
      const int64_t to = (first_row + row_of_cell(args.queries, query, at.window, cell)) * channels;
      slice.write(at.grad_keys + to, grad_key);
      slice.write(at.grad_values + to, grad_value);
    }
  }
}

}  // namespace mmoe::sva
