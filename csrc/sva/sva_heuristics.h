// How the CUDA kernels of sva are launched: pure host arithmetic, without torch and CUDA
// (tests/csrc/test_heuristics.py).
#pragma once

#include <algorithm>
#include <cstdint>

namespace mmoe::sva {

constexpr int kLanesOfWarp = 32;
constexpr int64_t kSharedByDefault = 48 * 1024;  // bytes a block gets without asking for more

// The widest head the kernels take: a warp's lanes hold kScalarsPerLane elements each where vectors do not fit.
constexpr int kScalarsPerLane = 8;
constexpr int kWidestHead = kLanesOfWarp * kScalarsPerLane;

// Launch of the kernels over projected encoders.
struct ProjectedLaunch {
  bool vectors;          // 16-byte accesses
  int lanes;             // lanes that share a head: 4, 8, 16 or 32
  int groups;            // of heads that a query is split into, a warp each
  int warps;             // of a block
  int64_t shared_bytes;  // of a block of the backward: two floats a key and head
};

// `aligned`: every pointer and row stride is a multiple of 16 bytes, and so is a head. `keys`: of a query. The fewest
// lanes that hold a head in vectors, so that a warp reads whole rows; more where a warp's weights of many keys would
// not fit into shared memory.
inline ProjectedLaunch projected_launch(int64_t heads, int64_t width, int64_t element_bytes, bool aligned,
                                        int64_t keys) {
  const int64_t vector = 16 / element_bytes;
  const bool vectors = aligned && width <= kLanesOfWarp * vector;
  const auto bytes_of_warp = [keys](int lanes) { return keys * (kLanesOfWarp / lanes) * 8; };
  int lanes = vectors ? 4 : kLanesOfWarp;
  while (lanes < kLanesOfWarp && (lanes * vector < width || bytes_of_warp(lanes) > kSharedByDefault)) lanes *= 2;
  const int heads_of_warp = kLanesOfWarp / lanes;
  const int64_t fitting = kSharedByDefault / std::max<int64_t>(bytes_of_warp(lanes), 1);
  const int warps = static_cast<int>(std::clamp<int64_t>(fitting, 1, 4));
  return {vectors, lanes, static_cast<int>((heads + heads_of_warp - 1) / heads_of_warp), warps,
          warps * bytes_of_warp(lanes)};
}

}  // namespace mmoe::sva
