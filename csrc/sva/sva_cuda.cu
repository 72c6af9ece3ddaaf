// sva on CUDA: launches and registration.
#include "common/launch.h"
#include "common/library.h"
#include "sva/sva.h"
#include "sva/sva_heuristics.h"
#include "sva/sva_kernel_projected.cuh"

namespace mmoe {
namespace {

namespace device = sva;

// What both directions need of the arguments. Holds the tensors that are read, so that copies live long enough.
struct Problem {
  SvaSizes sizes;
  device::Queries queries;
  Tensor q;
  Tensors keys, values, masks;

  Problem(const SvaSizes& of, const Tensor& q_any, const Tensors& keys_any, const Tensors& values_any,
          const Tensors& masks_any)
      : sizes(of), q(torch::stable::contiguous(q_any)) {
    check(sizes.width <= device::kWidestHead, "sva: q must have heads of at most ", device::kWidestHead, " on CUDA");
    check(sizes.queries() * sizes.heads <= std::numeric_limits<int>::max(), "sva: q has too many queries for CUDA");
    for (int64_t m : sizes.window) {
      check(m * m * sizes.rows * sizes.columns <= std::numeric_limits<int>::max(), "sva: a grid is too large for CUDA");
    }
    queries = {static_cast<int>(sizes.rows), static_cast<int>(sizes.columns), static_cast<int>(sizes.heads),
               static_cast<int>(sizes.width)};
    for (const Tensor& grid : keys_any) keys.push_back(sva_readable(grid));
    for (const Tensor& grid : values_any) values.push_back(sva_readable(grid));
    for (const Tensor& grid : masks_any) masks.push_back(grid.numel() > 0 ? sva_readable(grid) : grid);
  }

  int64_t channels() const { return sizes.heads * sizes.width; }
  int64_t projected() const { return static_cast<int64_t>(keys.size()); }

  // A mask of one cell a window changes nothing: a window without a True key counts as all True.
  const bool* mask(size_t encoder) const {
    const Tensor& grid = masks[encoder];
    return grid.numel() > 0 && sizes.window[encoder] > 1 ? grid.const_data_ptr<bool>() : nullptr;
  }
};

bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

// Images too start on 16 bytes.
bool aligned_images(const Tensor& grid, int64_t element_bytes) {
  return aligned(grid) && (grid.size(0) == 1 || grid.stride(0) * element_bytes % 16 == 0);
}

int64_t bytes_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

int64_t keys_of_query(const Problem& problem) {
  int64_t keys = 0;
  for (size_t i = 0; i < problem.keys.size(); ++i) keys += problem.sizes.window[i] * problem.sizes.window[i];
  return keys;
}

template <typename... Others>
device::ProjectedLaunch projected_launch(const Problem& problem, const Others&... others) {
  const int64_t bytes = bytes_of(problem.q.scalar_type());
  bool fits = problem.sizes.width * bytes % 16 == 0 && aligned(problem.q) && (aligned(others) && ...);
  for (const Tensor& grid : problem.keys) fits = fits && aligned_images(grid, bytes);
  for (const Tensor& grid : problem.values) fits = fits && aligned_images(grid, bytes);
  return device::projected_launch(problem.sizes.heads, problem.sizes.width, bytes, fits, keys_of_query(problem));
}

template <typename T>
device::Projected<T> projected_args(const Problem& problem, const device::ProjectedLaunch& launch,
                                    const Tensors& grad_keys, const Tensors& grad_values) {
  device::Projected<T> args = {};
  args.encoders = static_cast<int>(problem.projected());
  args.queries = problem.queries;
  args.groups = launch.groups;
  args.units = static_cast<unsigned>(problem.sizes.queries() * launch.groups);
  args.scale = 1.0f / std::sqrt(static_cast<float>(problem.sizes.width));
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
void for_launch(const device::ProjectedLaunch& launch, Body&& body) {
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

unsigned blocks_of(const Problem& problem, const device::ProjectedLaunch& launch) {
  return static_cast<unsigned>((problem.sizes.queries() * launch.groups + launch.warps - 1) / launch.warps);
}

// Without `out`, stops at lse.
void launch_projected(const DeviceScope& scope, const Problem& problem, const float* others, const Tensor* out,
                      Tensor& lse) {
  const auto launch = out == nullptr ? projected_launch(problem) : projected_launch(problem, *out);
  for_device_type(problem.q.scalar_type(), "sva: q", [&](auto type) {
    using T = decltype(type);
    const auto args = projected_args<T>(problem, launch, {}, {});
    for_launch(launch, [&](auto width, auto vectors) {
      auto* kernel = device::projected_kernel<T, width(), vectors()>;
      MMOE_LAUNCH(kernel, blocks_of(problem, launch), launch.warps * kWarp, 0, scope.stream())
      (args, others, out == nullptr ? nullptr : data<T>(*out), lse.mutable_data_ptr<float>());
    });
  });
  check_launch("sva: projected_kernel");
}

// Without `grad_q`, stops at delta.
void launch_projected_backward(const DeviceScope& scope, const Problem& problem, const Tensor& grad_out,
                               const Tensor& lse, const float* others, const Tensor* grad_q, const Tensors& grad_keys,
                               const Tensors& grad_values, Tensor* delta) {
  const auto launch =
      grad_q == nullptr ? projected_launch(problem, grad_out) : projected_launch(problem, grad_out, *grad_q);
  for_device_type(problem.q.scalar_type(), "sva: q", [&](auto type) {
    using T = decltype(type);
    const auto args = projected_args<T>(problem, launch, grad_keys, grad_values);
    for_launch(launch, [&](auto width, auto vectors) {
      auto* kernel = device::projected_backward_kernel<T, width(), vectors()>;
      MMOE_LAUNCH(kernel, blocks_of(problem, launch), launch.warps * kWarp, launch.shared_bytes, scope.stream())
      (args, grad_out.numel() == 0 ? nullptr : static_cast<const T*>(grad_out.const_data_ptr()),
       lse.const_data_ptr<float>(), others, static_cast<int>(keys_of_query(problem)),
       grad_q == nullptr ? nullptr : data<T>(*grad_q), delta == nullptr ? nullptr : delta->mutable_data_ptr<float>());
    });
  });
  check_launch("sva: projected_backward_kernel");
}

Tensor new_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, tensor.sizes()); }

SvaResult sva_cuda(Tensor q, Tensors keys, Tensors values, Tensors features, Tensors positions, Tensors absorbed,
                   Tensors constants, Tensors masks, double) {
  const SvaSizes sizes = check_sva(q, keys, values, features, positions, absorbed, constants, masks);
  check(features.empty(), "sva: features are not supported on CUDA yet");
  const DeviceScope scope(q);
  const Problem problem(sizes, q, keys, values, masks);
  Tensor out = torch::stable::new_empty(q, {sizes.batch, sizes.rows, sizes.columns, problem.channels()});
  Tensor lse = torch::stable::new_empty(q, {sizes.batch, sizes.rows, sizes.columns, sizes.heads}, ScalarType::Float);
  if (sizes.queries() > 0) launch_projected(scope, problem, nullptr, &out, lse);
  return {out, lse, {}, {}};
}

SvaGradients sva_backward_cuda(Tensor grad_out, Tensors grad_pooled, Tensors grad_mass, Tensor q, Tensors keys,
                               Tensors values, Tensors features, Tensors positions, Tensors absorbed, Tensors constants,
                               Tensors masks, Tensor lse_any, double) {
  const SvaSizes sizes = check_sva(q, keys, values, features, positions, absorbed, constants, masks);
  check_sva_backward(sizes, grad_out, grad_pooled, grad_mass, q, lse_any);
  check(features.empty(), "sva: features are not supported on CUDA yet");
  const DeviceScope scope(q);
  const Problem problem(sizes, q, keys, values, masks);
  const Tensor grad = torch::stable::contiguous(grad_out), lse = torch::stable::contiguous(lse_any);
  const Tensor grad_q = new_like(q);
  Tensors grad_keys, grad_values;
  for (const Tensor& grid : keys) {
    grad_keys.push_back(new_like(grid));
    grad_values.push_back(new_like(grid));
  }
  if (sizes.queries() > 0) {
    launch_projected_backward(scope, problem, grad, lse, nullptr, &grad_q, grad_keys, grad_values, nullptr);
  }
  return {grad_q, grad_keys, grad_values, {}, {}, {}, {}, {}};
}

}  // namespace

MMOE_CUDA(m) {
  m.impl("sva", TORCH_BOX(&sva_cuda));
  m.impl("sva_backward", TORCH_BOX(&sva_backward_cuda));
}

}  // namespace mmoe
