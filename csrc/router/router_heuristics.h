// How the CUDA kernels of router are launched: pure host arithmetic, without torch and CUDA
// (tests/csrc/test_heuristics.py).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/shared_memory.h"

namespace mmoe::router {

constexpr int kWidestRow = 2304;
constexpr int kMostChosen = 32;      // a lane each
constexpr int kMostGroups = 32;      // selection groups, a lane each
constexpr int kListed = 64;          // candidates that a warp has room for
constexpr int kCandidateBytes = 12;  // key, column, score
constexpr int kBackwardWarps = 8;    // of a block, where they fit
constexpr int kBackwardBlocks = 4;   // of a multiprocessor

// Threads a block of the forward may have: registers are given to it for so many.
constexpr int most_threads(int vectors) { return vectors <= 6 ? 1024 : 256; }

struct ForwardLaunch {
  int vectors;  // of four columns that a lane holds; the kernel has instances for 2, 6 and 18, aligned for 1 and 4 too
  int warps;    // of a block, a token each at a time
  int blocks;   // each has partial sums of its own
  int64_t shared_bytes;
};

// One large block a multiprocessor: bias, counts and sums are per block, so fewer blocks move fewer bytes besides the
// logits. `aligned`: every row is, to 16 bytes. `shared_limit`: what a block may ask for.
inline ForwardLaunch forward_launch(int64_t tokens, int64_t columns, bool aligned, int64_t multiprocessors,
                                    int64_t shared_limit) {
  int vectors = 18;
  for (int room : {6, 4, 2, 1}) {
    if (columns <= 128 * room && (aligned || room == 6 || room == 2)) vectors = room;
  }
  const int64_t row = int64_t{128} * vectors * 4;  // bytes of the columns that a warp has room for
  const int64_t of_block = 2 * row, of_warp = row + kListed * kCandidateBytes;
  const int64_t fitting = std::min<int64_t>((shared_limit - of_block) / of_warp, most_threads(vectors) / 32);
  const int64_t wanted = (tokens + multiprocessors - 1) / multiprocessors;
  const int64_t warps = std::clamp<int64_t>(wanted, std::min<int64_t>(4, fitting), fitting);
  const int64_t blocks = std::min((tokens + warps - 1) / warps, multiprocessors);
  return {vectors, static_cast<int>(warps), static_cast<int>(blocks), of_block + warps * of_warp};
}

struct BackwardLaunch {
  int warps;
  int blocks;
  int64_t shared_bytes;  // a row of scores a warp, and the gradient of the probabilities
};

inline BackwardLaunch backward_launch(int64_t tokens, int64_t columns, int64_t multiprocessors) {
  const int64_t row = (columns + 3) / 4 * 16;
  const int64_t warps = std::min<int64_t>(kSharedByDefault / row - 1, kBackwardWarps);
  const int64_t blocks = std::min((tokens + warps - 1) / warps, multiprocessors * kBackwardBlocks);
  return {static_cast<int>(warps), static_cast<int>(blocks), (warps + 1) * row};
}

}  // namespace mmoe::router
