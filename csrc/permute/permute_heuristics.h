// How the rows of permute and unpermute are cut among the threads of a block. A pure function of the host, without
// torch and CUDA; tests/csrc/test_permute_heuristics.py calls it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mmoe {

constexpr int64_t kMaxRowThreads = 512;

// Threads of a block that takes `held` pieces of a row a thread at a time, where a row has `pieces` of them: as few
// rounds over the row as kMaxRowThreads allow, and then no more warps than those rounds need.
inline int row_threads(int64_t pieces, int64_t held) {
  const int64_t rounds = std::max<int64_t>(1, (pieces + kMaxRowThreads * held - 1) / (kMaxRowThreads * held));
  const int64_t threads = (pieces + rounds * held - 1) / (rounds * held);
  return static_cast<int>(std::max<int64_t>(32, (threads + 31) / 32 * 32));
}

}  // namespace mmoe
