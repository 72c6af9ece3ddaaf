// Packing under two bounds: the tokens and the images of a pack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace mmoe {

// Longest items first; each goes into the pack with the least room for tokens that it still fits in, else opens one.
// Ties go to the lower index and to the older pack, so that the result does not depend on the sorting algorithm.
inline void best_fit_decreasing(const std::int64_t* tokens, const std::int64_t* images, std::int64_t n,
                                std::int64_t max_tokens, std::int64_t max_images, std::int32_t* pack) {
  struct Room {
    std::int64_t tokens;
    std::int64_t images;
  };
  std::vector<std::int64_t> by_length(n);
  std::iota(by_length.begin(), by_length.end(), 0);
  std::stable_sort(by_length.begin(), by_length.end(),
                   [&](std::int64_t a, std::int64_t b) { return tokens[a] > tokens[b]; });
  std::vector<Room> rooms;
  for (const auto i : by_length) {
    if (tokens[i] > max_tokens || images[i] > max_images) {
      pack[i] = -1;
      continue;
    }
    std::size_t best = rooms.size();
    for (std::size_t p = 0; p < rooms.size(); ++p) {
      if (rooms[p].tokens >= tokens[i] && rooms[p].images >= images[i] &&
          (best == rooms.size() || rooms[p].tokens < rooms[best].tokens)) {
        best = p;
      }
    }
    if (best == rooms.size()) rooms.push_back({max_tokens, max_images});
    rooms[best].tokens -= tokens[i];
    rooms[best].images -= images[i];
    pack[i] = static_cast<std::int32_t>(best);
  }
}

}  // namespace mmoe
