// What the router's kernels are told besides their tensors; the meaning of each is in router.h. No torch in this file.
#pragma once

#include <cstdint>

namespace mmoe {

enum class Score { softmax, sigmoid };
enum class Identity { scaled, unscaled, copy, drop };

struct RouterOptions {
  int64_t columns;  // N + Z
  int64_t experts;  // N
  int64_t top_k;
  double scaling;
  Score score;
  bool renormalize;
  Identity identity;
  int64_t balance_groups;
  int64_t selection_groups;
  int64_t selected_groups;
};

// Added to the sum that renormalised weights are divided by, as the released models do.
constexpr double kRenormalizeEpsilon = 1e-20;

}  // namespace mmoe
