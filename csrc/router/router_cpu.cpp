// router on the CPU: chunks of tokens in parallel on torch's threads. A chunk holds the same tokens for any number of
// threads, and the chunks' sums are added in their order.
#include <algorithm>
#include <vector>

#include "common/library.h"
#include "common/past_caches.h"
#include "router/router.h"
#include "router/router_simd.h"

namespace mmoe {
namespace {

// About 20 microseconds of work; at most so many chunks, since each has sums of its own.
constexpr int64_t kElementsPerChunk = 1 << 15;
constexpr int64_t kCostOfToken = 128;  // in elements: what a token costs besides its columns
constexpr int64_t kMostChunks = 256;

int64_t tokens_per_chunk(int64_t tokens, int64_t columns) {
  const int64_t by_work = kElementsPerChunk / (columns + kCostOfToken) + 1;
  return std::max(by_work, (tokens + kMostChunks - 1) / kMostChunks);
}

// Calls body(kernels of the dtype, C{}).
template <typename Body>
void for_type(ScalarType dtype, Body&& body) {
  const RouterKernels& all = router_kernels();
  switch (dtype) {
    case ScalarType::Float:
      return body(std::get<0>(all), float{});
    case ScalarType::Double:
      return body(std::get<1>(all), double{});
    default:
      check(false, "router: logits must be float32 or float64 on the CPU");
  }
}

// The tensor made contiguous and kept alive, its memory or null.
template <typename T>
class Input {
 public:
  explicit Input(const std::optional<Tensor>& tensor) {
    if (tensor) held_ = torch::stable::contiguous(*tensor);
  }
  const T* data() const { return held_ ? held_->const_data_ptr<T>() : nullptr; }

 private:
  std::optional<Tensor> held_;
};

// Scratch memory on a cache line, whatever the vector's allocator does.
template <typename C>
class Scratch {
 public:
  explicit Scratch(int64_t elements) : memory_(elements + 64 / sizeof(C)) {}
  C* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (64 - address % 64) % 64 / sizeof(C);
  }

 private:
  std::vector<C> memory_;
};

Router router_cpu(Tensor logits_any, Tensor bias_any, std::optional<Tensor> valid_any, int64_t zero_experts,
                  int64_t top_k, double scaling, std::string score, bool renormalize, int64_t balance_groups,
                  int64_t selection_groups, int64_t selected_groups, std::string identity) {
  check(logits_any.dim() == 2, "router: logits must be [T, N+Z]");
  const int64_t tokens = logits_any.size(0), columns = logits_any.size(1);
  const RouterOptions options{columns,     columns - zero_experts, top_k,          scaling,          score_of(score),
                              renormalize, identity_of(identity),  balance_groups, selection_groups, selected_groups};
  check_router_forward(logits_any, bias_any, valid_any, options);
  const Tensor logits = torch::stable::contiguous(logits_any), bias = torch::stable::contiguous(bias_any);

  Tensor ids = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Long);
  Tensor weights = torch::stable::new_empty(logits, {tokens, top_k});
  Tensor identity_weight = torch::stable::new_empty(logits, {tokens});
  Tensor counts = torch::stable::new_empty(logits, {columns}, ScalarType::Long);
  Tensor group_probs = torch::stable::new_empty(logits, {balance_groups + 1});
  Tensor stats = torch::stable::new_empty(logits, {tokens, 2});

  const int64_t per_chunk = tokens_per_chunk(tokens, columns), chunks = (tokens + per_chunk - 1) / per_chunk;
  std::vector<int32_t> chunk_counts(chunks * columns);
  for_type(logits.scalar_type(), [&](const auto& kernels, auto c) {
    using C = decltype(c);
    const Input<bool> valid(valid_any);
    const RouterForward<C> tensors{
        logits.const_data_ptr<C>(),      bias.const_data_ptr<C>(),      valid.data(),
        ids.mutable_data_ptr<int64_t>(), weights.mutable_data_ptr<C>(), identity_weight.mutable_data_ptr<C>(),
        stats.mutable_data_ptr<C>()};
    const RouterScratch sizes = RouterScratch::of(options);
    std::vector<C> chunk_probs(chunks * (balance_groups + 1));
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      Scratch<C> scratch(sizes.forward());
      for (int64_t chunk = first; chunk < last; ++chunk) {
        kernels.forward(options, tensors, sizes, scratch.data(), chunk * per_chunk,
                        std::min(tokens, (chunk + 1) * per_chunk), chunk_counts.data() + chunk * columns,
                        chunk_probs.data() + chunk * (balance_groups + 1));
      }
    });
    C* const probs = group_probs.mutable_data_ptr<C>();
    for (int64_t group = 0; group <= balance_groups; ++group) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += chunk_probs[chunk * (balance_groups + 1) + group];
      probs[group] = static_cast<C>(total);
    }
  });
  int64_t* const count = counts.mutable_data_ptr<int64_t>();
  std::fill(count, count + columns, 0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < columns; ++i) count[i] += chunk_counts[chunk * columns + i];
  }
  return {weights, identity_weight, group_probs, stats, ids, counts};
}

Tensor router_backward_cpu(std::optional<Tensor> grad_weights, std::optional<Tensor> grad_identity,
                           std::optional<Tensor> grad_group_probs, Tensor logits_any, std::optional<Tensor> valid_any,
                           Tensor ids_any, Tensor stats_any, int64_t zero_experts, double scaling, std::string score,
                           bool renormalize, int64_t balance_groups, std::string identity) {
  check(logits_any.dim() == 2, "router: logits must be [T, N+Z]");
  check(ids_any.dim() == 2, "router: ids must be [T, k]");
  const int64_t tokens = logits_any.size(0), columns = logits_any.size(1);
  const RouterOptions options{columns,     columns - zero_experts, ids_any.size(1), scaling, score_of(score),
                              renormalize, identity_of(identity),  balance_groups,  1,       1};
  check_router_backward(grad_weights, grad_identity, grad_group_probs, logits_any, valid_any, ids_any, stats_any,
                        options);
  const Tensor logits = torch::stable::contiguous(logits_any), ids = torch::stable::contiguous(ids_any);
  const Tensor stats = torch::stable::contiguous(stats_any);
  Tensor grad_logits = torch::stable::new_empty(logits, {tokens, columns});
  for_type(logits.scalar_type(), [&](const auto& kernels, auto c) {
    using C = decltype(c);
    const Input<bool> valid(valid_any);
    const Input<C> for_weights(grad_weights), for_identity(grad_identity), for_groups(grad_group_probs);
    std::vector<C> grad_probs;
    if (for_groups.data() != nullptr) {
      grad_probs.resize(columns);
      const int64_t size = options.experts / balance_groups;
      for (int64_t i = 0; i < columns; ++i) grad_probs[i] = for_groups.data()[std::min(i / size, balance_groups)];
    }
    const RouterBackward<C> tensors{logits.const_data_ptr<C>(),
                                    valid.data(),
                                    ids.const_data_ptr<int64_t>(),
                                    stats.const_data_ptr<C>(),
                                    for_weights.data(),
                                    for_identity.data(),
                                    grad_probs.empty() ? nullptr : grad_probs.data(),
                                    grad_logits.mutable_data_ptr<C>(),
                                    streams(grad_logits.const_data_ptr(), tokens, columns * sizeof(C))};
    const RouterScratch sizes = RouterScratch::of(options);
    torch::stable::parallel_for(0, tokens, tokens_per_chunk(tokens, columns), [&](int64_t begin, int64_t end) {
      Scratch<C> scratch(sizes.backward());
      kernels.backward(options, tensors, scratch.data(), begin, end);
    });
  });
  return grad_logits;
}

}  // namespace

MMOE_CPU(m) {
  m.impl("router", TORCH_BOX(&router_cpu));
  m.impl("router_backward", TORCH_BOX(&router_backward_cpu));
}

}  // namespace mmoe
