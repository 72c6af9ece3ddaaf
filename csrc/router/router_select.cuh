// The parts of router's forward that a warp does on one token, its row in registers: scores, eligible groups, and the k
// best slots in order. No torch in this file.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "router/router_heuristics.h"
#include "router/router_options.h"

namespace mmoe::router {

// Unsigned integers in the order of the values, NaN above all and 0 below all. (There is no -0: scores are never -0.)
__device__ __forceinline__ unsigned key_of(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
  return value != value ? 0xffffffffu : ordered;
}
__device__ __forceinline__ float value_of(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The order of the slots: higher keys first, then lower columns.
__device__ __forceinline__ unsigned long long slot_of(unsigned key, int column) {
  return static_cast<unsigned long long>(key) << 32 | ~static_cast<unsigned>(column);
}

// One value a lane, sorted falling over the lanes by compare-exchange; `payload` goes along.
struct Alone {
  __device__ __forceinline__ void exchange(int, bool) {}
};
struct WithScore {
  float score;
  __device__ __forceinline__ void exchange(int reach, bool take) {
    const float other = __shfl_xor_sync(kAllLanes, score, reach);
    score = take ? other : score;
  }
};

template <typename Key, typename Payload>
__device__ __forceinline__ void compare_exchange(Key& key, Payload& payload, int lane, int reach, bool falling) {
  const Key other = __shfl_xor_sync(kAllLanes, key, reach);
  const bool wants_higher = ((lane & reach) == 0) == falling;
  const bool take = wants_higher ? other > key : other < key;
  key = take ? other : key;
  payload.exchange(reach, take);
}

// Bitonic: the last merge alone sorts what rises and then falls.
template <typename Key, typename Payload>
__device__ __forceinline__ void merge_lanes(Key& key, Payload& payload, int lane) {
#pragma unroll
  for (int reach = kWarp / 2; reach > 0; reach /= 2) compare_exchange(key, payload, lane, reach, true);
}
template <typename Key, typename Payload>
__device__ __forceinline__ void sort_lanes(Key& key, Payload& payload, int lane) {
#pragma unroll
  for (int run = 2; run < kWarp; run *= 2) {
#pragma unroll
    for (int reach = run / 2; reach > 0; reach /= 2) {
      compare_exchange(key, payload, lane, reach, (lane & run) == 0);
    }
  }
  merge_lanes(key, payload, lane);
}

// Both sorted falling; `key` becomes the higher half of the two, sorted.
template <typename Key, typename Payload>
__device__ __forceinline__ void keep_higher(Key& key, Payload& payload, Key other, Payload other_payload, int lane) {
  other = __shfl_xor_sync(kAllLanes, other, kWarp - 1);
  other_payload.exchange(kWarp - 1, true);
  if (other > key) {
    key = other;
    payload = other_payload;
  }
  merge_lanes(key, payload, lane);
}

// A value that the compiler knows nothing of.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The columns of a lane. With 16-byte accesses it holds four neighbours at a time, else every 32nd.
template <int kVectors, bool kAligned>
struct Row {
  static constexpr int kCount = 4 * kVectors;
  static constexpr int kRoom = kWarp * kCount;

  float values[kCount];  // logits, then scores
  int lane;

  __device__ __forceinline__ int column(int i) const { return column(lane, i); }
  __device__ static __forceinline__ int column(int lane, int i) {
    return kAligned ? 4 * (lane + kWarp * (i / 4)) + i % 4 : lane + kWarp * i;
  }

  __device__ __forceinline__ void load(const float* row, int columns) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float four[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      if constexpr (kAligned) {
        if (column(4 * v) < columns) load_vector(row + column(4 * v), four);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (column(4 * v + j) < columns) four[j] = row[column(4 * v + j)];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) values[4 * v + j] = four[j];
    }
  }

  // Calls body(i, column(i), shared[column(i)]) for each of the lane's columns. Every lane of the warp calls it: across
  // the barrier, and from a lane number it cannot see through, the compiler keeps neither the keys nor the columns of
  // an earlier call, which would take twice the registers of the row.
  template <typename Body>
  __device__ __forceinline__ void with_shared(const float* shared, Body&& body) const {
    __syncwarp();
    const int own = opaque(lane);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float four[4];
      if constexpr (kAligned) {
        load_vector(shared + column(own, 4 * v), four);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = shared[column(own, 4 * v + j)];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) body(4 * v + j, column(own, 4 * v + j), four[j]);
    }
  }

  // shared[column(i)] += values[i] * factor
  __device__ __forceinline__ void add_to_shared(float* shared, float factor) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kAligned) {
        float four[4];
        load_vector(shared + column(4 * v), four);
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] += values[4 * v + j] * factor;
        store_vector(shared + column(4 * v), four);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) shared[column(4 * v + j)] += values[4 * v + j] * factor;
      }
    }
  }
};

// Logits become scores. Returns (largest logit, 1 / sum), as RouterOptions' stats say.
template <int kVectors, bool kAligned>
__device__ __forceinline__ float2 score_row(Row<kVectors, kAligned>& row, Score score) {
  float largest = 0.0f, total = 0.0f;
  if (score == Score::softmax) {
    largest = row.values[0];
#pragma unroll
    for (int i = 1; i < row.kCount; ++i) largest = max_or_nan(largest, row.values[i]);
    largest = warp_max(largest);
  }
#pragma unroll
  for (int i = 0; i < row.kCount; ++i) {
    const float power = expf(score == Score::softmax ? row.values[i] - largest : -row.values[i]);
    row.values[i] = score == Score::softmax ? power : 1.0f / (1.0f + power);
    total += row.values[i];
  }
  const float inverse = 1.0f / warp_sum(total);
  if (score == Score::softmax) {
#pragma unroll
    for (int i = 0; i < row.kCount; ++i) row.values[i] *= inverse;
  }
  return make_float2(largest, inverse);
}

// Which columns may be chosen: all of the row's, or those of the best groups and the zero experts.
struct Eligible {
  int columns;
  int experts;         // 0 without groups
  float inverse_size;  // of a selection group
  unsigned groups;

  __device__ __forceinline__ bool operator()(int column) const {
    if (column >= experts) return column < columns;
    // Exact: column + 0.5 is half a column away from every border, far more than the rounding of the product.
    return groups >> static_cast<int>((static_cast<float>(column) + 0.5f) * inverse_size) & 1u;
  }
};

template <int kVectors, bool kAligned>
__device__ __forceinline__ Eligible eligible_of(const Row<kVectors, kAligned>& row, const float* bias,
                                                const RouterOptions& options) {
  Eligible eligible{static_cast<int>(options.columns), 0, 0.0f, 0u};
  if (options.selection_groups == 1) return eligible;
  const int groups = static_cast<int>(options.selection_groups);
  const int size = static_cast<int>(options.experts) / groups;
  unsigned own = 0u;  // of the group with the lane's number
  for (int group = 0; group < groups; ++group) {
    unsigned best = 0u, second = 0u;
    const int first = group * size;
    row.with_shared(bias, [&](int i, int column, float b) {
      const int place = column - first;
      const unsigned key = place >= 0 && place < size ? key_of(row.values[i] + b) : 0u;
      second = max(second, min(best, key));
      best = max(best, key);
    });
#pragma unroll
    for (int reach = kWarp / 2; reach > 0; reach /= 2) {
      const unsigned other_best = __shfl_xor_sync(kAllLanes, best, reach);
      const unsigned other_second = __shfl_xor_sync(kAllLanes, second, reach);
      second = max(min(best, other_best), max(second, other_second));
      best = max(best, other_best);
    }
    if (row.lane == group) own = key_of(value_of(best) + value_of(second));
  }
  int before = 0;
  for (int group = 0; group < groups; ++group) {
    const unsigned other = __shfl_sync(kAllLanes, own, group);
    before += other > own || (other == own && group < row.lane);
  }
  eligible.experts = static_cast<int>(options.experts);
  eligible.inverse_size = 1.0f / static_cast<float>(size);
  eligible.groups = __ballot_sync(kAllLanes, row.lane < groups && before < options.selected_groups);
  return eligible;
}

// The list of a warp's candidates in shared memory.
struct Listed {
  unsigned* keys;
  int* columns;
  float* scores;
};

// The k best slots: lane j < k gets the column and the score of the j-th.
template <int kVectors, bool kAligned>
__device__ __forceinline__ void select(const Row<kVectors, kAligned>& row, const float* bias, const Eligible& eligible,
                                       int k, const Listed& list, int& column, float& score) {
  using Slot = unsigned long long;
  const auto key_at = [&](int i, int at, float b) { return eligible(at) ? key_of(row.values[i] + b) : 0u; };

  // A bound that at least k slots reach.
  Slot bound;
  {
    unsigned even = 0u, odd = 0u;
    row.with_shared(bias, [&](int i, int at, float b) {
      unsigned& highest = i % 2 ? odd : even;
      highest = max(highest, key_at(i, at, b));
    });
    Alone alone;
    if (k <= 16) {
      even = max(even, odd);
      sort_lanes(even, alone, row.lane);
    } else {
      sort_lanes(even, alone, row.lane);
      sort_lanes(odd, alone, row.lane);
      keep_higher(even, alone, odd, alone, row.lane);
    }
    // Key 0 may not be chosen.
    bound = static_cast<Slot>(max(__shfl_sync(kAllLanes, even, k - 1), 1u)) << 32;
  }

  int listed = 0;
  const unsigned lanes_before = (1u << row.lane) - 1u;
  for (;;) {
    listed = 0;
    row.with_shared(bias, [&](int i, int at, float b) {
      const unsigned key = key_at(i, at, b);
      const bool takes = slot_of(key, at) >= bound;
      const unsigned takers = __ballot_sync(kAllLanes, takes);
      if (takers == 0u) return;
      const int place = listed + __popc(takers & lanes_before);
      if (takes && place < kListed) {
        list.keys[place] = key;
        list.columns[place] = at;
        list.scores[place] = row.values[i];
      }
      listed += __popc(takers);
    });
    if (listed <= kListed) break;
    // Too many ties, or scores in an unlucky order: the highest bound that k slots reach, bit by bit.
    bound = 0;
    for (int bit = 63; bit >= 0; --bit) {
      const Slot higher = bound | Slot{1} << bit;
      int reaching = 0;
      row.with_shared(bias, [&](int i, int at, float b) { reaching += slot_of(key_at(i, at, b), at) >= higher; });
      if (warp_sum(reaching) >= k) bound = higher;
    }
  }
  __syncwarp();

  const auto slot_at = [&](int place) { return place < listed ? slot_of(list.keys[place], list.columns[place]) : 0; };
  Slot slot = slot_at(row.lane);
  WithScore with{row.lane < listed ? list.scores[row.lane] : 0.0f};
  sort_lanes(slot, with, row.lane);
  if (listed > kWarp) {
    Slot more = slot_at(kWarp + row.lane);
    WithScore with_more{kWarp + row.lane < listed ? list.scores[kWarp + row.lane] : 0.0f};
    sort_lanes(more, with_more, row.lane);
    keep_higher(slot, with, more, with_more, row.lane);
  }
  __syncwarp();  // the list may be filled anew
  column = static_cast<int>(~static_cast<unsigned>(slot));
  score = with.score;
}

}  // namespace mmoe::router
