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
// floor; and K b C for positions, once a block, or three times a query where sva_heuristics.h found no room for them:
// those reads are of rows that every query shares, so of the caches. Where x^ itself has no place or rows lie off the
// vector grid, a lane takes one element at a time and makes x^ again, from the caches, wherever it is needed.
//
// Occupancy is 25%, two blocks a multiprocessor: x^, and absorbed and grad_pooled in the backward, of two queries fill
// its shared memory. A block has 16 KiB or more of loads under way while it reads, and its neighbour computes then.
//
// Not yet run on a GPU.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "sva/sva_kernel.cuh"

namespace mmoe::sva {

constexpr int kAbsorbedThreads = 256;
constexpr int kAbsorbedBlocks = 2;  // of a multiprocessor, at least: shared memory holds no more of the usual shapes
constexpr int kAbsorbedWarps = kAbsorbedThreads / kWarp;
constexpr int kTileRows = kWarp / kKeysOfTile;  // so that each lane ends up with one dot product of a tile
constexpr int kSums = 4;                        // that a warp makes at a time, of a vector a lane each

template <typename T>
struct AbsorbedEncoder {
  const T* features;
  const T* positions;  // or null
  const T* absorbed;
  const float* constants;
  const bool* mask;  // or null
  T* pooled;
  float* mass;
  // Of the backward.
  const T* grad_pooled;    // or null
  const float* grad_mass;  // or null
  T* grad_features;
  T* grad_absorbed;
  float* grad_constants;

  int64_t features_of_image, cells_of_image;  // strides between images of features and mask
  int window, channels;
};

template <typename T>
struct Absorbed {
  AbsorbedEncoder<T> encoder[kMostEncoders];
  AbsorbedLayout layout;
  int encoders;
  Queries queries;
  int count;  // of queries
  float scale, eps;
};

// What a lane takes of a row of channels at a time: a vector, or one element where nothing is staged.
template <typename T, bool kStaged>
struct Item {
  static constexpr int kCount = kStaged ? kVector<T> : 1;

  static __device__ __forceinline__ void read(const T* from, float (&values)[kCount]) {
    if constexpr (kStaged) {
      load_vector(from, values);
    } else {
      values[0] = to_float(*from);
    }
  }
  static __device__ __forceinline__ void write(T* to, const float (&values)[kCount]) {
    if constexpr (kStaged) {
      store_vector(to, values);
    } else {
      *to = from_float<T>(values[0]);
    }
  }
};

// One encoder as a warp of the block sees it for one query.
template <typename T, bool kStaged>
struct Seen {
  using Item = mmoe::sva::Item<T, kStaged>;
  static constexpr int kCount = Item::kCount;

  const AbsorbedEncoder<T>& at;
  const T* image;        // of the features
  const T* positions;    // in shared or global memory, or null
  T* normed = nullptr;   // where staged: x^
  T* streams = nullptr;  // where staged: absorbed and grad_pooled
  float2* moments;       // of the encoder's keys: mean, 1 / standard deviation
  int* cells;            // of the encoder's keys, those of the window that count
  unsigned long long* valid;
  int first_key;
  int items;  // of a row

  __device__ __forceinline__ Seen(const Absorbed<T>& args, const Query& query, int encoder, unsigned char* memory)
      : at(args.encoder[encoder]) {
    const AbsorbedLayout& layout = args.layout;
    image = at.features + query.image * at.features_of_image;
    positions =
        layout.positions[encoder] < 0 ? at.positions : reinterpret_cast<const T*>(memory + layout.positions[encoder]);
    if constexpr (kStaged) {
      normed = reinterpret_cast<T*>(memory + layout.normed[encoder]);
      streams = reinterpret_cast<T*>(memory + layout.streams[encoder]);
    }
    first_key = layout.first_key[encoder];
    moments = reinterpret_cast<float2*>(memory + layout.moments) + first_key;
    cells = reinterpret_cast<int*>(memory + layout.cells) + first_key;
    valid = reinterpret_cast<unsigned long long*>(memory + layout.valid) + encoder;
    items = at.channels / kCount;
  }

  __device__ __forceinline__ int keys() const { return __popcll(*valid); }

  __device__ __forceinline__ const T* row(const Queries& queries, const Query& query, int cell) const {
    return image + static_cast<int64_t>(row_of_cell(queries, query, at.window, cell)) * at.channels;
  }

  __device__ __forceinline__ void add_position(int cell, int item, float (&x)[kCount]) const {
    if (positions == nullptr) return;
    float position[kCount];
    Item::read(positions + cell * at.channels + item * kCount, position);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += position[i];
  }

  static __device__ __forceinline__ void normalise(float2 moment, float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = (x[i] - moment.x) * moment.y;
  }

  // x^ of an item of a key.
  __device__ __forceinline__ void read_normed(const Queries& queries, const Query& query, int key, int item,
                                              float (&x)[kCount]) const {
    if constexpr (kStaged) {
      Item::read(normed + key * at.channels + item * kCount, x);
    } else {
      Item::read(row(queries, query, cells[key]) + item * kCount, x);
      add_position(cells[key], item, x);
      normalise(moments[key], x);
    }
  }
};

// Copies the positions that have a place in shared memory there.
template <typename T, bool kStaged>
__device__ void stage_positions(const Absorbed<T>& args, unsigned char* memory) {
  using Item = Item<T, kStaged>;
  for (int encoder = 0; encoder < args.encoders; ++encoder) {
    if (args.layout.positions[encoder] < 0) continue;
    const AbsorbedEncoder<T>& at = args.encoder[encoder];
    T* to = reinterpret_cast<T*>(memory + args.layout.positions[encoder]);
    const int items = at.window * at.window * at.channels / Item::kCount;
    for (int item = static_cast<int>(threadIdx.x); item < items; item += kAbsorbedThreads) {
      float position[Item::kCount];
      Item::read(at.positions + item * Item::kCount, position);
      Item::write(to + item * Item::kCount, position);
    }
  }
  __syncthreads();
}

// The moments of the window's keys, and where it has a place their x^, a warp a key.
template <typename T, bool kStaged>
__device__ void normalise_window(const Absorbed<T>& args, const Query& query, int encoder, unsigned char* memory) {
  using Item = Item<T, kStaged>;
  const Seen<T, kStaged> seen(args, query, encoder, memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned long long valid =
      valid_cells(args.queries, query, seen.at.window, seen.at.mask, seen.at.cells_of_image);
  if (threadIdx.x == 0) *seen.valid = valid;
  unsigned long long left = valid;
  for (int key = 0; left != 0; ++key, left &= left - 1) {
    // Encoders of one key each go to different warps.
    if ((key + encoder) % kAbsorbedWarps != warp) continue;
    const int cell = __ffsll(static_cast<long long>(left)) - 1;
    const T* row = seen.row(args.queries, query, cell);
    T* kept = nullptr;
    if constexpr (kStaged) kept = seen.normed + key * seen.at.channels;
    float x[Item::kCount], sum = 0.0f;
#pragma unroll 4
    for (int item = lane; item < seen.items; item += kWarp) {
      Item::read(row + item * Item::kCount, x);
      if constexpr (kStaged) Item::write(kept + item * Item::kCount, x);
      seen.add_position(cell, item, x);
#pragma unroll
      for (int i = 0; i < Item::kCount; ++i) sum += x[i];
    }
    const float mean = warp_sum(sum) / static_cast<float>(seen.at.channels);
    // A lane reads back only what it wrote.
    const T* source = kStaged ? kept : row;
    float squares = 0.0f;
    for (int item = lane; item < seen.items; item += kWarp) {
      Item::read(source + item * Item::kCount, x);
      seen.add_position(cell, item, x);
#pragma unroll
      for (int i = 0; i < Item::kCount; ++i) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    }
    const float variance = warp_sum(squares) / static_cast<float>(seen.at.channels);
    const float2 moment = make_float2(mean, rsqrtf(variance + args.eps));
    if (lane == 0) {
      seen.moments[key] = moment;
      seen.cells[key] = cell;
    }
    if constexpr (kStaged) {
      for (int item = lane; item < seen.items; item += kWarp) {
        Item::read(kept + item * Item::kCount, x);
        seen.add_position(cell, item, x);
        seen.normalise(moment, x);
        Item::write(kept + item * Item::kCount, x);
      }
    }
  }
}

// Sums each of the 2 * kReach values over the warp; lane i gets the i-th sum. A template, not a loop, so that every
// index is a constant and the values stay in registers.
template <int kReach = kWarp / 2>
__device__ __forceinline__ float transposed_sum(const float (&values)[2 * kReach]) {
  const bool upper = (threadIdx.x & kReach) != 0;
  float halves[kReach];
#pragma unroll
  for (int i = 0; i < kReach; ++i) {
    const float mine = upper ? values[i + kReach] : values[i], theirs = upper ? values[i] : values[i + kReach];
    halves[i] = mine + __shfl_xor_sync(kAllLanes, theirs, kReach);
  }
  if constexpr (kReach == 1) {
    return halves[0];
  } else {
    return transposed_sum<kReach / 2>(halves);
  }
}

// Dot products of two rows of channels with the x^ of keys from .. from + 15: lane i gets that of row i / 16 and key
// from + i % 16. The second row may be null and counts as 0. `each(item, first, second)` sees the rows pass by.
template <typename T, bool kStaged, typename Each>
__device__ __forceinline__ float tile_of_dots(const Absorbed<T>& args, const Query& query, const Seen<T, kStaged>& seen,
                                              const T* first, const T* second, int from, int keys, Each&& each) {
  using Item = Item<T, kStaged>;
  float sums[kWarp];
  // "= {}" becomes a loop over local memory for an array of this size.
#pragma unroll
  for (int i = 0; i < kWarp; ++i) sums[i] = 0.0f;
  for (int item = static_cast<int>(threadIdx.x) % kWarp; item < seen.items; item += kWarp) {
    float one[Item::kCount], two[Item::kCount] = {};
    Item::read(first + item * Item::kCount, one);
    if (second != nullptr) Item::read(second + item * Item::kCount, two);
    each(item, one, two);
#pragma unroll
    for (int key = 0; key < kKeysOfTile; ++key) {
      if (from + key < keys) {
        float x[Item::kCount];
        seen.read_normed(args.queries, query, from + key, item, x);
#pragma unroll
        for (int i = 0; i < Item::kCount; ++i) {
          sums[key] = fmaf(one[i], x[i], sums[key]);
          sums[kKeysOfTile + key] = fmaf(two[i], x[i], sums[kKeysOfTile + key]);
        }
      }
    }
  }
  return transposed_sum(sums);
}

// One of the kSums weighted sums of x^ that a warp makes at a time.
template <typename T>
struct Mixture {
  const float* weights;  // of the encoder's keys, in shared memory
  T* to;                 // a row of channels; null for none
};

// Sums over the window's keys, for every i < mixtures: to = sum of weights * x^. mixture(i) gives the i-th.
template <typename T, bool kStaged, typename Give>
__device__ __forceinline__ void mix(const Absorbed<T>& args, const Query& query, const Seen<T, kStaged>& seen,
                                    int groups, Give&& mixture) {
  using Item = Item<T, kStaged>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int chunks = (seen.items + kWarp - 1) / kWarp, keys = seen.keys();
  for (int task = warp; task < groups * chunks; task += kAbsorbedWarps) {
    const int group = task / chunks, item = task % chunks * kWarp + lane;
    if (item >= seen.items) continue;
    Mixture<T> made[kSums];
    float sums[kSums][Item::kCount] = {};
#pragma unroll
    for (int i = 0; i < kSums; ++i) made[i] = mixture(group, i);
    for (int key = 0; key < keys; ++key) {
      float x[Item::kCount];
      seen.read_normed(args.queries, query, key, item, x);
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float weight = made[i].weights[key];
#pragma unroll
        for (int j = 0; j < Item::kCount; ++j) sums[i][j] = fmaf(weight, x[j], sums[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (made[i].to != nullptr) Item::write(made[i].to + item * Item::kCount, sums[i]);
    }
  }
}

// A head's row of [H, B, R, W, C].
template <typename T>
__device__ __forceinline__ T* row_of_head(T* tensor, const AbsorbedEncoder<std::remove_const_t<T>>& at, int head,
                                          int queries, int query) {
  return tensor + (static_cast<int64_t>(head) * queries + query) * at.channels;
}

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
