// Packing under two bounds: the tokens and the images of a pack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace mmoe {

// Fills packs with the largest items first. Best fit puts an item where the least room is left; it wins where items are
// large. Worst fit spreads them over as few packs as could do at best; it wins where many small items are short of one
// bound and large ones of the other, because every pack gets some of both. The filling with fewer packs is taken.
class Packing {
 public:
  Packing(const std::int64_t* tokens, const std::int64_t* images, std::int64_t n, std::int64_t max_tokens,
          std::int64_t max_images)
      : tokens_(tokens), images_(images), n_(n), whole_{max_tokens, max_images} {
    for (std::int64_t i = 0; i < n; ++i) {
      if (tokens[i] <= max_tokens && images[i] <= max_images) items_.push_back(i);
    }
    // Stable, so that the result does not depend on the library's sorting algorithm.
    std::stable_sort(items_.begin(), items_.end(), [this](auto a, auto b) { return size(a) > size(b); });
  }

  // The pack of every item, -1 where it fits in none.
  void run(std::int32_t* pack) const {
    std::vector<std::int32_t> spread(n_, -1);
    std::fill(pack, pack + n_, -1);
    const auto fewest = fill(0, true, pack);
    if (fill(lower_bound(), false, spread.data()) < fewest) std::copy(spread.begin(), spread.end(), pack);
  }

 private:
  struct Room {
    std::int64_t tokens;
    std::int64_t images;
  };

  // Both bounds on one scale, max_tokens · max_images.
  std::int64_t scaled(std::int64_t tokens) const { return tokens * std::max<std::int64_t>(whole_.images, 1); }
  std::int64_t size(std::int64_t i) const { return std::max(scaled(tokens_[i]), images_[i] * whole_.tokens); }
  std::int64_t left(const Room& room) const {
    return whole_.images ? std::min(scaled(room.tokens), room.images * whole_.tokens) : room.tokens;
  }

  std::int64_t lower_bound() const {
    Room sum{0, 0};
    for (const auto i : items_) {
      sum.tokens += tokens_[i];
      sum.images += images_[i];
    }
    const auto packs = [](std::int64_t sum, std::int64_t whole) { return whole ? (sum + whole - 1) / whole : 0; };
    return std::max(packs(sum.tokens, whole_.tokens), packs(sum.images, whole_.images));
  }

  std::int64_t fill(std::int64_t packs, bool best_fit, std::int32_t* pack) const {
    std::vector<Room> rooms(packs, whole_);
    for (const auto i : items_) {
      std::size_t chosen = rooms.size();
      for (std::size_t p = 0; p < rooms.size(); ++p) {
        if (rooms[p].tokens < tokens_[i] || rooms[p].images < images_[i]) continue;
        if (chosen == rooms.size() ||
            (best_fit ? left(rooms[p]) < left(rooms[chosen]) : left(rooms[p]) > left(rooms[chosen]))) {
          chosen = p;
        }
      }
      if (chosen == rooms.size()) rooms.push_back(whole_);
      rooms[chosen].tokens -= tokens_[i];
      rooms[chosen].images -= images_[i];
      pack[i] = static_cast<std::int32_t>(chosen);
    }
    return static_cast<std::int64_t>(rooms.size());
  }

  const std::int64_t* tokens_;
  const std::int64_t* images_;
  std::int64_t n_;
  Room whole_;
  std::vector<std::int64_t> items_;
};

}  // namespace mmoe
