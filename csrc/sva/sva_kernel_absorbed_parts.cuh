// What the kernels of sva over absorbed encoders share: arguments, a query's window as a warp sees it, and the three
// steps over it. Their story is in sva_kernel_absorbed.cuh. No torch in this file.
//
// Not yet run on a GPU.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "sva/sva_kernel.cuh"

namespace mmoe::sva {

constexpr int kAbsorbedThreads = 256;
constexpr int kAbsorbedWarps = kAbsorbedThreads / kWarp;
constexpr int kTileRows = kWarp / kKeysOfTile;  // so that each lane ends up with one dot product of a tile
constexpr int kHeld = 32;                       // channels of a row that a lane keeps in registers: rows of 1024
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
  AbsorbedEncoder<T> encoder[kSvaEncoders];
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
  T* streams = nullptr;  // where they have a place: absorbed and grad_pooled
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
      if (layout.streams[encoder] >= 0) streams = reinterpret_cast<T*>(memory + layout.streams[encoder]);
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

// The moments of a row of at most kHeld channels a lane, and its x^ to `kept`. The row is held in registers meanwhile,
// so that it and the positions are read once.
template <typename T>
__device__ __forceinline__ float2 normalise_held(const Seen<T, true>& seen, const T* row, int cell, float eps,
                                                 T* kept) {
  using Item = Item<T, true>;
  constexpr int kItems = kHeld / Item::kCount;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float channels = static_cast<float>(seen.at.channels);
  float x[kItems][Item::kCount], sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int held = 0; held < kItems; ++held) {
    const int item = lane + held * kWarp;
    if (item >= seen.items) continue;
    Item::read(row + item * Item::kCount, x[held]);
    seen.add_position(cell, item, x[held]);
#pragma unroll
    for (int i = 0; i < Item::kCount; ++i) sum += x[held][i];
  }
  const float mean = warp_sum(sum) / channels;
#pragma unroll
  for (int held = 0; held < kItems; ++held) {
    if (lane + held * kWarp >= seen.items) continue;
#pragma unroll
    for (int i = 0; i < Item::kCount; ++i) squares = fmaf(x[held][i] - mean, x[held][i] - mean, squares);
  }
  const float2 moment = make_float2(mean, rsqrtf(warp_sum(squares) / channels + eps));
#pragma unroll
  for (int held = 0; held < kItems; ++held) {
    const int item = lane + held * kWarp;
    if (item >= seen.items) continue;
    seen.normalise(moment, x[held]);
    Item::write(kept + item * Item::kCount, x[held]);
  }
  return moment;
}

// The same of a row of any length, which is read again, from shared memory where it is kept, for every step.
template <typename T, bool kStaged>
__device__ __forceinline__ float2 normalise_row(const Seen<T, kStaged>& seen, const T* row, int cell, float eps,
                                                T* kept) {
  using Item = Item<T, kStaged>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float channels = static_cast<float>(seen.at.channels);
  float x[Item::kCount], sum = 0.0f, squares = 0.0f;
#pragma unroll 4
  for (int item = lane; item < seen.items; item += kWarp) {
    Item::read(row + item * Item::kCount, x);
    if constexpr (kStaged) Item::write(kept + item * Item::kCount, x);
    seen.add_position(cell, item, x);
#pragma unroll
    for (int i = 0; i < Item::kCount; ++i) sum += x[i];
  }
  const float mean = warp_sum(sum) / channels;
  // A lane reads back only what it wrote.
  const T* source = kStaged ? kept : row;
  for (int item = lane; item < seen.items; item += kWarp) {
    Item::read(source + item * Item::kCount, x);
    seen.add_position(cell, item, x);
#pragma unroll
    for (int i = 0; i < Item::kCount; ++i) squares = fmaf(x[i] - mean, x[i] - mean, squares);
  }
  const float2 moment = make_float2(mean, rsqrtf(warp_sum(squares) / channels + eps));
  if constexpr (kStaged) {
    for (int item = lane; item < seen.items; item += kWarp) {
      Item::read(kept + item * Item::kCount, x);
      seen.add_position(cell, item, x);
      seen.normalise(moment, x);
      Item::write(kept + item * Item::kCount, x);
    }
  }
  return moment;
}

// The moments of the window's keys, and where it has a place their x^, a warp a key.
template <typename T, bool kStaged>
__device__ void normalise_window(const Absorbed<T>& args, const Query& query, int encoder, unsigned char* memory) {
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
    float2 moment;
    if constexpr (kStaged) {
      T* kept = seen.normed + key * seen.at.channels;
      moment = seen.at.channels <= kHeld * kWarp ? normalise_held(seen, row, cell, args.eps, kept)
                                                 : normalise_row(seen, row, cell, args.eps, kept);
    } else {
      moment = normalise_row<T, kStaged>(seen, row, cell, args.eps, nullptr);
    }
    if (lane == 0) {
      seen.moments[key] = moment;
      seen.cells[key] = cell;
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

}  // namespace mmoe::sva
