#include "router/router_simd.h"

#include <limits>

#include "common/stream.h"

namespace mmoe::MMOE_SIMD {
namespace {

template <typename C>
using KeyOf = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;

// Below the key of every value, -inf included: what may not be chosen.
template <typename C>
constexpr KeyOf<C> kNever = std::numeric_limits<KeyOf<C>>::min();

template <typename V>
MMOE_INLINE V iota() {
  V index;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(index[0])); ++i) index[i] = i;
  return index;
}

// Integers in the order of the values, NaN above all. There is no -0 to tell from +0: scores are never -0, and no sum
// of anything else with a bias is.
template <typename C>
MMOE_INLINE Vec<KeyOf<C>> key_of(Vec<C> values) {
  using Key = KeyOf<C>;
  constexpr int sign = 8 * sizeof(C) - 1;
  const Vec<Key> bits = std::bit_cast<Vec<Key>>(values);
  const Vec<Key> ordered = bits ^ ((bits >> sign) & std::numeric_limits<Key>::max());
  return values != values ? Vec<Key>{} + std::numeric_limits<Key>::max() : ordered;
}

template <typename C>
MMOE_INLINE C value_of(KeyOf<C> key) {
  return std::bit_cast<C>(key ^ ((key >> (8 * sizeof(C) - 1)) & std::numeric_limits<KeyOf<C>>::max()));
}

template <typename V>
MMOE_INLINE V greater_of(V a, V b) {
#if defined(__AVX512F__)
  // The instruction for it, b where either is NaN; GCC makes a comparison and a blend.
  if constexpr (std::is_same_v<V, Vec<float>>) {
    return std::bit_cast<V>(_mm512_maskz_max_ps(0xffff, std::bit_cast<__m512>(a), std::bit_cast<__m512>(b)));
  }
#endif
  return a > b ? a : b;
}

template <typename V, typename T>
MMOE_INLINE V read(const T* from) {
  V values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}
template <typename V, typename T>
MMOE_INLINE void write(T* to, V values) {
  std::memcpy(to, &values, sizeof(values));
}

template <typename V>
MMOE_INLINE bool any(V condition) {
  uint64_t words[kBytes / 8], all = 0;
  std::memcpy(words, &condition, kBytes);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

// The candidates for the k best, in the order of the columns.
template <typename C>
struct Candidates {
  using Key = KeyOf<C>;
  const Key* all;  // keys by column
  Key* columns;
  Key* keys;
  Key* ranks;
  int64_t count;

  // ranks[i]: how many come before i, ties to the earlier. Comparing all with all needs count^2 / lanes steps, but none
  // branches or waits for another.
  MMOE_INLINE void rank() {
    constexpr int64_t lanes = kLanes<C>;
    for (int64_t i = 0; i < count; ++i) keys[i] = all[columns[i]];
    for (int64_t first = 0; first < count; first += lanes) {
      const Vec<Key> mine = read<Vec<Key>>(keys + first), index = iota<Vec<Key>>() + static_cast<Key>(first);
      const int64_t own = first + lanes < count ? first + lanes : count;
      Vec<Key> before{};
      for (int64_t j = 0; j < first; ++j) before -= keys[j] >= mine;
      for (int64_t j = first; j < own; ++j) {
        before -= (keys[j] > mine) | ((keys[j] == mine) & (static_cast<Key>(j) < index));
      }
      for (int64_t j = own; j < count; ++j) before -= keys[j] > mine;
      write(ranks + first, before);
    }
  }

  // Keeps the k best, in the order of the columns. Returns the key that a later column needs to be among them: above
  // the k-th, since ties go to the earlier. (Above NaN's there is none; a later NaN comes in and loses the tie.)
  Key prune(int64_t k) {
    rank();
    Key last{};
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (ranks[i] >= k) continue;
      if (ranks[i] == k - 1) last = keys[i];
      columns[kept++] = columns[i];
    }
    count = kept;
    return last == std::numeric_limits<Key>::max() ? last : last + 1;
  }

  // Appends those of the columns from `first` whose values reach the threshold. Writes up to a whole vector behind the
  // last.
  MMOE_INLINE void append(Vec<Key> values, int64_t first, Key threshold) {
#ifdef __AVX512F__
    if constexpr (sizeof(C) == 4) {
      const __mmask16 takes = _mm512_cmpge_epi32_mask(std::bit_cast<__m512i>(values), _mm512_set1_epi32(threshold));
      const Vec<Key> index = iota<Vec<Key>>() + static_cast<Key>(first);
      write(columns + count, _mm512_maskz_compress_epi32(takes, std::bit_cast<__m512i>(index)));
      count += __builtin_popcount(takes);
      return;
    }
#endif
    if (!any(values >= threshold)) return;
    for (int64_t lane = 0; lane < kLanes<C>; ++lane) {
      columns[count] = static_cast<Key>(first + lane);
      count += values[lane] >= threshold;
    }
  }
};

// A bound that at least k of the keys reach: the k-th highest of the maxima of `buckets` sets of columns.
template <typename Key>
MMOE_INLINE Key threshold_of(const Key* keys, int64_t columns, int64_t buckets, int64_t k, Key* maxima) {
  constexpr int64_t lanes = kBytes / sizeof(Key);
  for (int64_t first = 0; first < buckets; first += lanes) {
    Vec<Key> best = read<Vec<Key>>(keys + first);
    for (int64_t i = first + buckets; i < columns; i += buckets) best = greater_of(best, read<Vec<Key>>(keys + i));
    write(maxima + first, best);
  }
  constexpr Key most = std::numeric_limits<Key>::max();
  Vec<Key> least = Vec<Key>{} + most;
  for (int64_t first = 0; first < buckets; first += lanes) {
    const Vec<Key> mine = read<Vec<Key>>(maxima + first);
    Vec<Key> above{};
    for (int64_t j = 0; j < buckets; ++j) above -= maxima[j] > mine;
    // Fewer than k maxima are above the k-th highest and above each that is higher.
    const Vec<Key> high = above < static_cast<Key>(k) ? mine : Vec<Key>{} + most;
    least = least < high ? least : high;
  }
  const Key bound = detail::fold(least, [](Key a, Key b) { return a < b ? a : b; });
  return bound > std::numeric_limits<Key>::min() ? bound : std::numeric_limits<Key>::min() + 1;
}

// Group-limited selection: the keys of the experts outside the best groups become kNever.
template <typename C>
void keep_best_groups(const RouterOptions& options, KeyOf<C>* keys, KeyOf<C>* scores, Candidates<C> groups) {
  using Key = KeyOf<C>;
  const int64_t size = options.experts / options.selection_groups;
  groups.count = options.selection_groups;
  for (int64_t group = 0; group < groups.count; ++group) {
    const Key* own = keys + group * size;
    Key best = kNever<C>, second = kNever<C>;
    for (int64_t i = 0; i < size; ++i) {
      const Key lower = own[i] < best ? own[i] : best;
      best = own[i] < best ? best : own[i];
      second = lower < second ? second : lower;
    }
    const C score = value_of<C>(best) + value_of<C>(second);
    scores[group] = key_of<C>(broadcast(score))[0];
    groups.columns[group] = static_cast<Key>(group);
  }
  groups.rank();
  for (int64_t group = 0; group < groups.count; ++group) {
    if (groups.ranks[group] < options.selected_groups) continue;
    for (int64_t i = 0; i < size; ++i) keys[group * size + i] = kNever<C>;
  }
}

// The columns of the k best keys, falling, in chosen.keys. chosen.all is padded with kNever to whole buckets.
template <typename C>
MMOE_INLINE void select(const RouterScratch& sizes, int64_t k, Candidates<C>& chosen) {
  using Key = KeyOf<C>;
  constexpr int64_t lanes = kLanes<C>;
  chosen.count = 0;
  Key bound = kNever<C> + 1;
  if (sizes.columns > sizes.buckets) bound = threshold_of(chosen.all, sizes.columns, sizes.buckets, k, chosen.keys);
  for (int64_t i = 0; i < sizes.columns; i += lanes) {
    chosen.append(read<Vec<Key>>(chosen.all + i), i, bound);
    if (chosen.count > sizes.candidates - lanes) bound = chosen.prune(k);
  }
  chosen.rank();
  for (int64_t i = 0; i < chosen.count; ++i) chosen.keys[chosen.ranks[i]] = chosen.columns[i];
}

template <typename C>
void forward(const RouterOptions& options, const RouterForward<C>& tensors, const RouterScratch& sizes, C* scratch,
             int64_t begin, int64_t end, int32_t* counts, C* group_probs) {
  using Key = KeyOf<C>;
  constexpr int64_t lanes = kLanes<C>;
  const int64_t columns = options.columns, k = options.top_k;
  const int64_t body = columns - columns % lanes, filled = body < columns ? body + lanes : body;
  const C scaling = static_cast<C>(options.scaling);

  C* const raw = scratch;
  C* const bias = raw + sizes.columns;
  C* const mass = bias + sizes.columns;
  Key* const keys = reinterpret_cast<Key*>(mass + sizes.columns);
  Key* const lists = keys + sizes.columns;
  Candidates<C> chosen{keys, lists, lists + sizes.candidates, lists + 2 * sizes.candidates, 0};
  Key* const group_scores = lists + 3 * sizes.candidates;
  Key* const group_lists = group_scores + sizes.groups;
  const Candidates<C> groups{group_scores, group_lists, group_lists + sizes.groups, group_lists + 2 * sizes.groups, 0};

  std::memcpy(bias, tensors.bias, columns * sizeof(C));
  for (int64_t i = columns; i < sizes.columns; ++i) bias[i] = 0;
  for (int64_t i = 0; i < sizes.columns; ++i) mass[i] = 0;
  for (int64_t i = 0; i < sizes.columns; ++i) keys[i] = kNever<C>;
  std::memset(counts, 0, columns * sizeof(int32_t));

  for (int64_t token = begin; token < end; ++token) {
    const C* row = tensors.logits + token * columns;
    const bool counted = tensors.valid == nullptr || tensors.valid[token];

    // raw: exp(logit - largest), or the sigmoid; 0 behind the last column.
    Vec<C> total{};
    C largest = 0;
    if (options.score == Score::softmax) {
      // NaN may get lost here: its own exponential brings it back.
      const Vec<C> rest = load_first(row + body, columns - body, -std::numeric_limits<C>::infinity());
      Vec<C> most = rest, others = rest;
      int64_t first = 0;
      for (; first + 2 * lanes <= body; first += 2 * lanes) {
        most = greater_of(load(row + first), most);
        others = greater_of(load(row + first + lanes), others);
      }
      if (first < body) most = greater_of(load(row + first), most);
      largest = max_of(greater_of(most, others));
      const auto exponential = [&](int64_t i, Vec<C> logits) {
        const Vec<C> values = exp(logits - largest);
        total += values;
        store(raw + i, values);
      };
      for (int64_t i = 0; i < body; i += lanes) exponential(i, load(row + i));
      if (body < columns) exponential(body, rest);
    } else {
      const auto sigmoid = [&](int64_t i, Vec<C> logits) {
        const Vec<C> values = C(1) / (C(1) + exp(-logits));
        total += values;
        store(raw + i, values);
      };
      for (int64_t i = 0; i < body; i += lanes) sigmoid(i, load(row + i));
      if (body < columns) {
        sigmoid(body, load_first(row + body, columns - body, -std::numeric_limits<C>::infinity()));
      }
    }
    const C inverse = C(1) / sum(total);
    tensors.stats[2 * token] = largest;
    tensors.stats[2 * token + 1] = inverse;

    const C score_factor = options.score == Score::softmax ? inverse : C(1);
    for (int64_t i = 0; i < filled; i += lanes) {
      const Vec<C> values = load(raw + i);
      if (counted) store(mass + i, load(mass + i) + values * inverse);
      write(keys + i, key_of<C>(values * score_factor + load(bias + i)));
    }
    for (int64_t i = columns; i < filled; ++i) keys[i] = kNever<C>;
    if (options.selection_groups > 1) keep_best_groups(options, keys, group_scores, groups);

    select(sizes, k, chosen);
    int64_t* ids = tensors.ids + token * k;
    for (int64_t j = 0; j < k; ++j) ids[j] = chosen.keys[j];

    C divisor = 1;
    if (options.renormalize) {
      divisor = static_cast<C>(kRenormalizeEpsilon);
      for (int64_t j = 0; j < k; ++j) divisor += raw[ids[j]] * score_factor;
    }
    C identity = 0;
    for (int64_t j = 0; j < k; ++j) {
      const C share = raw[ids[j]] * score_factor / divisor;
      const C weight = share * scaling;
      tensors.weights[token * k + j] = weight;
      if (ids[j] >= options.experts) {
        identity += options.identity == Identity::scaled ? weight : options.identity == Identity::unscaled ? share : 1;
      }
      counts[ids[j]] += counted;
    }
    tensors.identity_weight[token] = counted && options.identity != Identity::drop ? identity : 0;
  }

  const int64_t size = options.experts / options.balance_groups;
  for (int64_t group = 0; group <= options.balance_groups; ++group) {
    const int64_t first = group * size, last = group < options.balance_groups ? first + size : columns;
    C group_sum = 0;
    for (int64_t i = first; i < last; ++i) group_sum += mass[i];
    group_probs[group] = group_sum;
  }
}

// s and its derivative with respect to the logit come from the logits again and the two numbers that forward kept of
// the row. A row is read once and its gradient written once; between the two passes s lies in the first-level cache.
template <typename C, bool kSoftmax>
void backward_of(const RouterOptions& options, const RouterBackward<C>& tensors, C* scratch, int64_t begin,
                 int64_t end) {
  constexpr int64_t lanes = kLanes<C>;
  const int64_t columns = options.columns, k = options.top_k;
  const int64_t body = columns - columns % lanes, filled = body + lanes;
  const C scaling = static_cast<C>(options.scaling);

  C* const scores = scratch;
  C* const slopes = scores + filled;     // gradient of p, by column
  C* const no_slopes = slopes + filled;  // and of a token that is left out
  C* const chosen = no_slopes + filled;  // gradient of s[ids]
  for (int64_t i = 0; i < filled; ++i) {
    slopes[i] = i < columns && tensors.grad_probs != nullptr ? tensors.grad_probs[i] : 0;
    no_slopes[i] = 0;
  }

  for (int64_t token = begin; token < end; ++token) {
    const C* row = tensors.logits + token * columns;
    C* const to = tensors.grad_logits + token * columns;
    const int64_t* ids = tensors.ids + token * k;
    const bool counted = tensors.valid == nullptr || tensors.valid[token];
    const C* slope = counted ? slopes : no_slopes;
    const C largest = tensors.stats[2 * token], inverse = tensors.stats[2 * token + 1];

    Vec<C> total{};
    const auto score = [&](int64_t i, Vec<C> logits) {
      const Vec<C> values = kSoftmax ? exp(logits - largest) * inverse : C(1) / (C(1) + exp(-logits));
      total += values * load(slope + i);
      store(scores + i, values);
    };
    for (int64_t i = 0; i < body; i += lanes) score(i, load(row + i));
    if (body < columns) score(body, load_first(row + body, columns - body, -std::numeric_limits<C>::infinity()));

    C identity = 0;
    if (counted && tensors.grad_identity != nullptr) {
      if (options.identity == Identity::scaled) identity = tensors.grad_identity[token] * scaling;
      if (options.identity == Identity::unscaled) identity = tensors.grad_identity[token];
    }
    for (int64_t j = 0; j < k; ++j) {
      chosen[j] = tensors.grad_weights != nullptr ? tensors.grad_weights[token * k + j] * scaling : 0;
      if (ids[j] >= options.experts) chosen[j] += identity;
    }
    if (options.renormalize) {
      C divisor = static_cast<C>(kRenormalizeEpsilon), mean = 0;
      for (int64_t j = 0; j < k; ++j) {
        divisor += scores[ids[j]];
        mean += scores[ids[j]] * chosen[j];
      }
      mean /= divisor;
      for (int64_t j = 0; j < k; ++j) chosen[j] = (chosen[j] - mean) / divisor;
    }

    // softmax: s (slope + chosen - sum of s (slope + chosen)); sigmoid: s (1 - s) (chosen + (slope - sum of p slope) /
    // sum of s). First as if nothing were chosen.
    C mean = sum(total);
    if (kSoftmax) {
      for (int64_t j = 0; j < k; ++j) mean += scores[ids[j]] * chosen[j];
    } else {
      mean *= inverse;
    }
    const auto gradient = [&](auto s, auto own_slope) {
      return kSoftmax ? s * (own_slope - mean) : s * (C(1) - s) * ((own_slope - mean) * inverse);
    };
    for (int64_t j = 0; j < k; ++j) {
      const C s = scores[ids[j]];
      chosen[j] = kSoftmax ? gradient(s, slope[ids[j]] + chosen[j])
                           : s * (C(1) - s) * (chosen[j] + (slope[ids[j]] - mean) * inverse);
    }
    // A streamed row is put together over the scores, since it leaves in whole lines.
    C* const grad = tensors.stream ? scores : to;
    for (int64_t i = 0; i < body; i += lanes) store(grad + i, gradient(load(scores + i), load(slope + i)));
    if (body < columns) store_first(grad + body, gradient(load(scores + body), load(slope + body)), columns - body);
    for (int64_t j = 0; j < k; ++j) grad[ids[j]] = chosen[j];
    if (!tensors.stream) continue;
    for (int64_t i = 0; i < columns; i += kPerLine<C>) store_line<true>(to + i, load_line(scores + i));
  }
  if (tensors.stream) end_stream();
}

template <typename C>
void backward(const RouterOptions& options, const RouterBackward<C>& tensors, C* scratch, int64_t begin, int64_t end) {
  const bool softmax = options.score == Score::softmax;
  (softmax ? backward_of<C, true> : backward_of<C, false>)(options, tensors, scratch, begin, end);
}

template <typename C>
constexpr RouterOf<C> of{forward<C>, backward<C>};

}  // namespace

const RouterKernels router_kernels{of<float>, of<double>};

}  // namespace mmoe::MMOE_SIMD
