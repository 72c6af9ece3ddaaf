// The order of the samples: an even blend of the sources and a keyed permutation within each.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

namespace mmoe {

inline std::int64_t total(const std::int64_t* counts, std::int64_t n) {
  return std::accumulate(counts, counts + n, std::int64_t{0});
}

// Place i goes to the source that lags most behind its share, counts[k] · (i + 1) / period. A source never gets ahead
// of the last place at which it is due, so that each has exactly counts[k] places in the end.
inline void blend(const std::int64_t* counts, std::int64_t n, std::int32_t* source, std::int64_t* rank) {
  const std::int64_t period = total(counts, n);
  std::vector<std::int64_t> taken(n, 0);
  for (std::int64_t i = 0; i < period; ++i) {
    std::int64_t best = 0;
    std::int64_t most = INT64_MIN;
    for (std::int64_t k = 0; k < n; ++k) {
      const std::int64_t lag = counts[k] * (i + 1) - period * taken[k];
      if (lag > most) {
        most = lag;
        best = k;
      }
    }
    source[i] = static_cast<std::int32_t>(best);
    rank[i] = taken[best]++;
  }
}

// A Feistel network over the smallest 4^h ≥ size, walked along its cycle until it falls into [0, size): a bijection of
// [0, size) for every key. On average fewer than four walks are needed.
class Permutation {
 public:
  Permutation(std::int64_t size, std::uint64_t key) : size_(static_cast<std::uint64_t>(size)) {
    while ((std::uint64_t{1} << (2 * half_bits_)) < size_) ++half_bits_;
    mask_ = (std::uint64_t{1} << half_bits_) - 1;
    for (auto& round_key : round_keys_) round_key = key = mix(key + 0x9E3779B97F4A7C15u);
  }

  std::int64_t operator()(std::int64_t index) const {
    auto x = static_cast<std::uint64_t>(index);
    do {
      std::uint64_t left = x >> half_bits_;
      std::uint64_t right = x & mask_;
      for (const auto round_key : round_keys_) {
        const std::uint64_t next = left ^ (mix(right + round_key) & mask_);
        left = right;
        right = next;
      }
      x = (left << half_bits_) | right;
    } while (x >= size_);
    return static_cast<std::int64_t>(x);
  }

 private:
  // The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
  static std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }

  std::uint64_t size_;
  std::uint64_t mask_ = 0;
  int half_bits_ = 1;
  std::uint64_t round_keys_[6];
};

}  // namespace mmoe
