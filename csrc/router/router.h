// router: the choice among N FFN experts and Z zero experts, by score plus bias, and its weights, by the score alone
// (LongCat-Flash, arXiv 2509.01322, section 2.1; group-limited as in DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
//
//   logits [T, N+Z] float32 (float64 on the CPU); bias [N+Z], dtype of logits; valid [T] bool or none
//   s = softmax(logits) over the columns, or sigmoid(logits); p = s over the sum of the row
// ->
//   weights         [T, k]: scaling * c with c = s[ids], divided by their sum + 1e-20 where renormalize
//   identity_weight [T]: over the slots with ids >= N: scaled: sum of weights, unscaled: of c, copy: their number,
//                   drop: 0; 0 where not valid
//   group_probs     [D+1], D = balance_groups: sums of p over the valid tokens and the D equal runs of experts, the
//                   zero experts last
//   stats           [T, 2] for the backward: softmax: (largest logit, 1 / sum of exp(logit - largest)); sigmoid:
//                   (0, 1 / sum of s)
//   ids             [T, k] int64: the k highest s + bias, falling; ties to the lowest index, NaN above everything. With
//                   selection_groups G > 1 the experts are G equal runs, ranked by the sum of their two best s + bias
//                   (ties to the lowest run), and those outside the selected_groups best are not eligible
//   counts          [N+Z] int64: slots per column over the valid tokens
// backward: the gradient of weights, identity_weight and group_probs (each may be absent) with respect to logits.
//
// RuntimeError: naming the argument of another shape or dtype, or out of range.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "common/arguments.h"
#include "router/router_options.h"

namespace mmoe {

using Router = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Score score_of(const std::string& name) {
  check(name == "softmax" || name == "sigmoid", "router: score is '", name, "', must be softmax or sigmoid");
  return name == "softmax" ? Score::softmax : Score::sigmoid;
}

inline Identity identity_of(const std::string& name) {
  if (name == "scaled") return Identity::scaled;
  if (name == "unscaled") return Identity::unscaled;
  if (name == "copy") return Identity::copy;
  check(name == "drop", "router: identity is '", name, "', must be scaled, unscaled, copy or drop");
  return Identity::drop;
}

// What forward and backward have in common.
inline void check_router(const Tensor& logits, const std::optional<Tensor>& valid, const RouterOptions& options) {
  check(logits.dim() == 2, "router: logits must be [T, N+Z]");
  check(options.experts >= 1 && options.experts <= options.columns, "router: zero_experts must be in 0 ... ",
        options.columns - 1);
  check(options.top_k >= 1 && options.top_k <= options.columns, "router: top_k must be in 1 ... ", options.columns);
  check(options.balance_groups >= 1 && options.experts % options.balance_groups == 0,
        "router: balance_groups must divide ", options.experts);
  check_tensor("router", valid, ScalarType::Bool, {logits.size(0)}, "valid");
}

inline void check_router_forward(const Tensor& logits, const Tensor& bias, const std::optional<Tensor>& valid,
                                 const RouterOptions& options) {
  check_router(logits, valid, options);
  check_tensor("router", bias, logits.scalar_type(), {options.columns}, "bias");
  const int64_t groups = options.selection_groups, selected = options.selected_groups;
  check(groups == 1 || (groups > 1 && options.experts % groups == 0 && options.experts / groups >= 2),
        "router: selection_groups must divide ", options.experts, " into runs of at least 2");
  check(selected >= 1 && selected <= groups, "router: selected_groups must be in 1 ... ", groups);
  check(selected * (options.experts / groups) + options.columns - options.experts >= options.top_k,
        "router: selected_groups leaves fewer than top_k = ", options.top_k, " experts");
}

inline void check_router_backward(const std::optional<Tensor>& grad_weights, const std::optional<Tensor>& grad_identity,
                                  const std::optional<Tensor>& grad_group_probs, const Tensor& logits,
                                  const std::optional<Tensor>& valid, const Tensor& ids, const Tensor& stats,
                                  const RouterOptions& options) {
  check_router(logits, valid, options);
  const int64_t tokens = logits.size(0), k = options.top_k;
  const ScalarType dtype = logits.scalar_type();
  check_tensor("router", ids, ScalarType::Long, {tokens, k}, "ids");
  check_tensor("router", stats, dtype, {tokens, 2}, "stats");
  check_tensor("router", grad_weights, dtype, {tokens, k}, "grad_weights");
  check_tensor("router", grad_identity, dtype, {tokens}, "grad_identity");
  check_tensor("router", grad_group_probs, dtype, {options.balance_groups + 1}, "grad_group_probs");
}

}  // namespace mmoe
