// The CPU kernels of router on plain memory, a range of tokens a call; the contract is in router.h.
#pragma once

#include <cstdint>
#include <tuple>

#include "common/simd_dispatch.h"
#include "router/router_options.h"

namespace mmoe {

template <typename C>
struct RouterForward {
  const C* logits;
  const C* bias;
  const bool* valid;  // may be null
  int64_t* ids;
  C* weights;
  C* identity_weight;
  C* stats;
};

template <typename C>
struct RouterBackward {
  const C* logits;
  const bool* valid;  // may be null
  const int64_t* ids;
  const C* stats;
  // Each may be null. grad_probs [columns]: what group_probs' gradient is for each column.
  const C* grad_weights;
  const C* grad_identity;
  const C* grad_probs;
  C* grad_logits;
  bool stream;  // write it past the caches: rows are whole cache lines
};

// Working memory of one call, in elements: rows of `columns`, and lists of candidates. `Key` is as large as C.
struct RouterScratch {
  int64_t buckets;     // the threshold is a bound from the maxima of so many sets of columns
  int64_t columns;     // N + Z rounded up to whole buckets
  int64_t candidates;  // room of a list
  int64_t groups;      // selection groups rounded up

  // Twice k buckets: then about 1.2 k columns pass the threshold when the scores have no pattern.
  static RouterScratch of(const RouterOptions& options) {
    const auto up = [](int64_t value, int64_t step) { return (value + step - 1) / step * step; };
    const int64_t buckets = up(2 * options.top_k, 32);
    return {buckets, up(options.columns, buckets), 2 * buckets, up(options.selection_groups, 32)};
  }
  int64_t forward() const { return 4 * columns + 3 * candidates + 4 * groups; }
  int64_t backward() const { return 3 * (columns + 16) + buckets; }
};

template <typename C>
struct RouterOf {
  // Tokens begin..end; counts [columns] and probs [columns] are set to the sums over these tokens.
  void (*forward)(const RouterOptions& options, const RouterForward<C>& tensors, const RouterScratch& sizes, C* scratch,
                  int64_t begin, int64_t end, int32_t* counts, C* group_probs);
  // grad_logits of tokens begin..end.
  void (*backward)(const RouterOptions& options, const RouterBackward<C>& tensors, C* scratch, int64_t begin,
                   int64_t end);
};

using RouterKernels = std::tuple<RouterOf<float>, RouterOf<double>>;

MMOE_DECLARE_SIMD(RouterKernels, router_kernels)

}  // namespace mmoe
