// router on CUDA: launch and registration.
#include "common/launch.h"
#include "common/library.h"
#include "router/router.h"
#include "router/router_kernel.cuh"
#include "router/router_kernel_backward.cuh"

namespace mmoe {
namespace {

void check_limits(const Tensor& logits, const RouterOptions& options) {
  check(logits.scalar_type() == ScalarType::Float, "router: logits must be float32 on CUDA");
  check(options.columns <= router::kWidestRow, "router: logits have ", options.columns, " columns, CUDA takes at most ",
        router::kWidestRow);
  check(options.top_k <= router::kMostChosen, "router: top_k is ", options.top_k, ", CUDA takes at most ",
        router::kMostChosen);
  check(options.selection_groups <= router::kMostGroups, "router: selection_groups is ", options.selection_groups,
        ", CUDA takes at most ", router::kMostGroups);
}

auto forward_kernel(int vectors, bool aligned) {
  switch (vectors) {
    case 1:
      return router::forward_kernel<1, true>;
    case 2:
      return aligned ? router::forward_kernel<2, true> : router::forward_kernel<2, false>;
    case 4:
      return router::forward_kernel<4, true>;
    case 6:
      return aligned ? router::forward_kernel<6, true> : router::forward_kernel<6, false>;
    default:
      return aligned ? router::forward_kernel<18, true> : router::forward_kernel<18, false>;
  }
}

template <int kWidth>
auto backward_kernel(Score score) {
  return score == Score::softmax ? router::backward_kernel<kWidth, Score::softmax>
                                 : router::backward_kernel<kWidth, Score::sigmoid>;
}

// Contiguous or none.
std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}
template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

Router router_cuda(Tensor logits_any, Tensor bias_any, std::optional<Tensor> valid_any, int64_t zero_experts,
                   int64_t top_k, double scaling, std::string score, bool renormalize, int64_t balance_groups,
                   int64_t selection_groups, int64_t selected_groups, std::string identity) {
  check(logits_any.dim() == 2, "router: logits must be [T, N+Z]");
  const int64_t tokens = logits_any.size(0), columns = logits_any.size(1);
  const RouterOptions options{columns,     columns - zero_experts, top_k,          scaling,          score_of(score),
                              renormalize, identity_of(identity),  balance_groups, selection_groups, selected_groups};
  check_router_forward(logits_any, bias_any, valid_any, options);
  check_limits(logits_any, options);
  const DeviceScope scope(logits_any);
  const Tensor logits = torch::stable::contiguous(logits_any), bias = torch::stable::contiguous(bias_any);
  const std::optional<Tensor> valid = packed(valid_any);

  Tensor weights = torch::stable::new_empty(logits, {tokens, top_k});
  Tensor identity_weight = torch::stable::new_empty(logits, {tokens});
  Tensor group_probs = torch::stable::new_empty(logits, {balance_groups + 1});
  Tensor stats = torch::stable::new_empty(logits, {tokens, 2});
  Tensor ids = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(logits, {columns}, ScalarType::Long);

  const bool aligned = rows_on_grid<float>(columns, logits.const_data_ptr<float>());
  const router::ForwardLaunch launch =
      router::forward_launch(tokens, columns, aligned, scope.multiprocessors(), scope.shared_bytes_per_block());
  Tensor block_counts = torch::stable::new_empty(logits, {launch.blocks, columns}, ScalarType::Int);
  Tensor block_probs = torch::stable::new_empty(logits, {launch.blocks, balance_groups + 1});
  const router::Forward tensors{logits.const_data_ptr<float>(),
                                bias.const_data_ptr<float>(),
                                data_or_null<bool>(valid),
                                ids.mutable_data_ptr<int64_t>(),
                                weights.mutable_data_ptr<float>(),
                                identity_weight.mutable_data_ptr<float>(),
                                stats.mutable_data_ptr<float>(),
                                block_counts.mutable_data_ptr<int32_t>(),
                                block_probs.mutable_data_ptr<float>()};
  if (launch.blocks > 0) {
    auto* kernel = forward_kernel(launch.vectors, aligned);
    allow_shared(scope, kernel);
    MMOE_LAUNCH(kernel, launch.blocks, launch.warps * kWarp, launch.shared_bytes, scope.stream())
    (tensors, options, tokens);
    check_launch("router: forward_kernel");
  }
  const int groups = static_cast<int>(balance_groups) + 1;
  const int64_t sum_blocks = (columns + kWarp - 1) / kWarp + (groups + router::kSumRuns - 1) / router::kSumRuns;
  MMOE_LAUNCH(router::sum_kernel, static_cast<unsigned>(sum_blocks), router::kSumThreads, 0, scope.stream())
  (tensors.block_counts, tensors.block_probs, launch.blocks, static_cast<int>(columns), groups,
   counts.mutable_data_ptr<int64_t>(), group_probs.mutable_data_ptr<float>());
  check_launch("router: sum_kernel");
  return {weights, identity_weight, group_probs, stats, ids, counts};
}

Tensor router_backward_cuda(std::optional<Tensor> grad_weights_any, std::optional<Tensor> grad_identity_any,
                            std::optional<Tensor> grad_group_probs_any, Tensor logits_any,
                            std::optional<Tensor> valid_any, Tensor ids_any, Tensor stats_any, int64_t zero_experts,
                            double scaling, std::string score, bool renormalize, int64_t balance_groups,
                            std::string identity) {
  check(logits_any.dim() == 2, "router: logits must be [T, N+Z]");
  check(ids_any.dim() == 2, "router: ids must be [T, k]");
  const int64_t tokens = logits_any.size(0), columns = logits_any.size(1);
  const RouterOptions options{columns,     columns - zero_experts, ids_any.size(1), scaling, score_of(score),
                              renormalize, identity_of(identity),  balance_groups,  1,       1};
  check_router_backward(grad_weights_any, grad_identity_any, grad_group_probs_any, logits_any, valid_any, ids_any,
                        stats_any, options);
  check_limits(logits_any, options);
  const DeviceScope scope(logits_any);
  const Tensor logits = torch::stable::contiguous(logits_any), ids = torch::stable::contiguous(ids_any);
  const Tensor stats = torch::stable::contiguous(stats_any);
  const std::optional<Tensor> valid = packed(valid_any), grad_weights = packed(grad_weights_any),
                              grad_identity = packed(grad_identity_any),
                              grad_group_probs = packed(grad_group_probs_any);
  Tensor grad_logits = torch::stable::new_empty(logits, {tokens, columns});
  if (tokens == 0) return grad_logits;
  const router::Backward tensors{data_or_null<float>(grad_weights),
                                 data_or_null<float>(grad_identity),
                                 data_or_null<float>(grad_group_probs),
                                 logits.const_data_ptr<float>(),
                                 data_or_null<bool>(valid),
                                 ids.const_data_ptr<int64_t>(),
                                 stats.const_data_ptr<float>(),
                                 grad_logits.mutable_data_ptr<float>()};
  const router::BackwardLaunch launch = router::backward_launch(tokens, columns, scope.multiprocessors());
  auto* kernel =
      (rows_on_grid<float>(columns, tensors.logits) ? backward_kernel<4> : backward_kernel<1>)(options.score);
  MMOE_LAUNCH(kernel, launch.blocks, launch.warps * kWarp, launch.shared_bytes, scope.stream())
  (tensors, options, tokens);
  check_launch("router: backward_kernel");
  return grad_logits;
}

}  // namespace

MMOE_CUDA(m) {
  m.impl("router", TORCH_BOX(&router_cuda));
  m.impl("router_backward", TORCH_BOX(&router_backward_cuda));
}

}  // namespace mmoe
