// sva on CUDA: launches over projected encoders.
#include "sva/sva_kernel_projected.cuh"
#include "sva/sva_launch.h"

namespace mmoe::sva {
namespace {

int64_t keys_of_query(const Problem& problem) {
  int64_t keys = 0;
  for (size_t i = 0; i < problem.keys.size(); ++i) keys += problem.sizes.window[i] * problem.sizes.window[i];
  return keys;
}

template <typename... Others>
ProjectedLaunch launch_of(const Problem& problem, const Others&... others) {
  const int64_t bytes = bytes_of(problem.q.scalar_type());
  bool fits = problem.sizes.width * bytes % 16 == 0 && aligned(problem.q) && (aligned(others) && ...);
  for (const Tensor& grid : problem.keys) fits = fits && aligned_images(grid, bytes);
  for (const Tensor& grid : problem.values) fits = fits && aligned_images(grid, bytes);
  return projected_launch(problem.sizes.heads, problem.sizes.width, bytes, fits, keys_of_query(problem));
}

template <typename T>
Projected<T> projected_args(const Problem& problem, const ProjectedLaunch& launch, const Tensors& grad_keys,
                            const Tensors& grad_values) {
  Projected<T> args = {};
  args.encoders = static_cast<int>(problem.keys.size());
  args.queries = problem.queries;
  args.groups = launch.groups;
  args.units = static_cast<unsigned>(problem.sizes.queries() * launch.groups);
  args.scale = problem.scale();
  args.q = static_cast<const T*>(problem.q.const_data_ptr());
  for (size_t i = 0; i < problem.keys.size(); ++i) {
    const bool* mask = problem.mask(i);
    args.encoder[i] = {static_cast<const T*>(problem.keys[i].const_data_ptr()),
                       static_cast<const T*>(problem.values[i].const_data_ptr()),
                       grad_keys.empty() ? nullptr : data<T>(grad_keys[i]),
                       grad_values.empty() ? nullptr : data<T>(grad_values[i]),
                       mask,
                       problem.keys[i].stride(0),
                       problem.values[i].stride(0),
                       mask == nullptr ? 0 : problem.masks[i].stride(0),
                       static_cast<int>(problem.sizes.window[i])};
  }
  return args;
}

// Calls body with the room for a head and whether lanes hold vectors, as types.
template <typename Body>
void for_launch(const ProjectedLaunch& launch, Body&& body) {
  using std::integral_constant;
  if (!launch.vectors) return body(integral_constant<int, 128>{}, std::false_type{});
  switch (launch.width) {
    case 32:
      return body(integral_constant<int, 32>{}, std::true_type{});
    case 64:
      return body(integral_constant<int, 64>{}, std::true_type{});
    default:
      return body(integral_constant<int, 128>{}, std::true_type{});
  }
}

unsigned blocks_of(const Problem& problem, const ProjectedLaunch& launch) {
  return static_cast<unsigned>((problem.sizes.queries() * launch.groups + launch.warps - 1) / launch.warps);
}

}  // namespace

void launch_projected(const DeviceScope& scope, const Problem& problem, const float* others, const Tensor* out,
                      Tensor& lse) {
  const auto launch = out == nullptr ? launch_of(problem) : launch_of(problem, *out);
  for_device_type(problem.q.scalar_type(), "sva: q", [&](auto type) {
    using T = decltype(type);
    const auto args = projected_args<T>(problem, launch, {}, {});
    for_launch(launch, [&](auto width, auto vectors) {
      auto* kernel = projected_kernel<T, width(), vectors()>;
      MMOE_LAUNCH(kernel, blocks_of(problem, launch), launch.warps * kWarp, 0, scope.stream())
      (args, others, out == nullptr ? nullptr : data<T>(*out), lse.mutable_data_ptr<float>());
    });
  });
  check_launch("sva: projected_kernel");
}

void launch_projected_backward(const DeviceScope& scope, const Problem& problem, const Tensor& grad_out,
                               const Tensor& lse, const float* others, const Tensor* grad_q, const Tensors& grad_keys,
                               const Tensors& grad_values, Tensor* delta) {
  const auto launch = grad_q == nullptr ? launch_of(problem, grad_out) : launch_of(problem, grad_out, *grad_q);
  for_device_type(problem.q.scalar_type(), "sva: q", [&](auto type) {
    using T = decltype(type);
    const auto args = projected_args<T>(problem, launch, grad_keys, grad_values);
    for_launch(launch, [&](auto width, auto vectors) {
      auto* kernel = projected_backward_kernel<T, width(), vectors()>;
      MMOE_LAUNCH(kernel, blocks_of(problem, launch), launch.warps * kWarp, launch.shared_bytes, scope.stream())
      (args, grad_out.numel() == 0 ? nullptr : static_cast<const T*>(grad_out.const_data_ptr()),
       lse.const_data_ptr<float>(), others, static_cast<int>(keys_of_query(problem)),
       grad_q == nullptr ? nullptr : data<T>(*grad_q), delta == nullptr ? nullptr : delta->mutable_data_ptr<float>());
    });
  });
  check_launch("sva: projected_backward_kernel");
}

}  // namespace mmoe::sva
