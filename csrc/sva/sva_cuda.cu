// sva on CUDA: launches and registration.
#include "common/launch.h"
#include "common/library.h"
#include "sva/sva.h"
#include "sva/sva_heuristics.h"
#include "sva/sva_kernel_absorbed.cuh"
#include "sva/sva_kernel_absorbed_backward.cuh"
#include "sva/sva_kernel_projected.cuh"

namespace mmoe {
namespace {

namespace device = sva;

Tensors contiguous(const Tensors& tensors) {
  Tensors made;
  for (const Tensor& tensor : tensors) made.push_back(torch::stable::contiguous(tensor));
  return made;
}

Tensors readable(const Tensors& grids) {
  Tensors made;
  for (const Tensor& grid : grids) made.push_back(grid.numel() > 0 ? sva_readable(grid) : grid);
  return made;
}

// What both directions need of the arguments. Holds the tensors that are read, so that copies live long enough.
struct Problem {
  SvaSizes sizes;
  device::Queries queries;
  float eps;
  Tensor q;
  Tensors keys, values, features, positions, absorbed, constants, masks;

  Problem(const Tensor& q_any, const Tensors& keys_any, const Tensors& values_any, const Tensors& features_any,
          const Tensors& positions_any, const Tensors& absorbed_any, const Tensors& constants_any,
          const Tensors& masks_any, double epsilon)
      : sizes(check_sva(q_any, keys_any, values_any, features_any, positions_any, absorbed_any, constants_any,
                        masks_any)),
        eps(static_cast<float>(epsilon)),
        q(torch::stable::contiguous(q_any)),
        keys(readable(keys_any)),
        values(readable(values_any)),
        features(readable(features_any)),
        positions(contiguous(positions_any)),
        absorbed(contiguous(absorbed_any)),
        constants(contiguous(constants_any)),
        masks(readable(masks_any)) {
    check(sizes.width <= device::kWidestHead, "sva: q must have heads of at most ", device::kWidestHead, " on CUDA");
    check(sizes.queries() * sizes.heads <= std::numeric_limits<int>::max(), "sva: q has too many queries for CUDA");
    for (int64_t m : sizes.window) {
      check(m * m * sizes.rows * sizes.columns <= std::numeric_limits<int>::max(), "sva: a grid is too large for CUDA");
    }
    queries = {static_cast<int>(sizes.rows), static_cast<int>(sizes.columns), static_cast<int>(sizes.heads),
               static_cast<int>(sizes.width)};
  }

  int64_t channels() const { return sizes.heads * sizes.width; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(sizes.width)); }

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

Tensor new_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, tensor.sizes()); }

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

bool aligned(const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return aligned(tensor); });
}

// What the kernels over absorbed encoders write, and read beyond the forward's arguments in the backward.
struct AbsorbedResult {
  Tensors pooled, mass;
  Tensors grad_pooled, grad_mass;  // given
  Tensors grad_features, grad_absorbed, grad_constants;

  bool backward() const { return !grad_features.empty(); }
};

AbsorbedResult new_absorbed_result(const Problem& problem) {
  AbsorbedResult made;
  for (size_t j = 0; j < problem.features.size(); ++j) {
    made.pooled.push_back(new_like(problem.absorbed[j]));
    made.mass.push_back(new_like(problem.constants[j]));
  }
  return made;
}

const float* floats(const Tensor& tensor) { return tensor.numel() == 0 ? nullptr : tensor.const_data_ptr<float>(); }

template <typename T>
const T* data_or_null(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<const T*>(tensor.const_data_ptr());
}

bool absorbed_fits_vectors(const Problem& problem, const AbsorbedResult& result) {
  const int64_t bytes = bytes_of(problem.q.scalar_type());
  bool fits = aligned(problem.positions) && aligned(problem.absorbed) && aligned(result.pooled) &&
              aligned(result.grad_pooled) && aligned(result.grad_features) && aligned(result.grad_absorbed);
  for (const Tensor& grid : problem.features) {
    fits = fits && grid.size(3) * bytes % 16 == 0 && aligned_images(grid, bytes);
  }
  return fits;
}

template <typename T>
device::Absorbed<T> absorbed_args(const DeviceScope& scope, const Problem& problem, const AbsorbedResult& result) {
  device::Absorbed<T> args = {};
  args.encoders = static_cast<int>(problem.features.size());
  args.queries = problem.queries;
  args.count = static_cast<int>(problem.sizes.queries());
  args.scale = problem.scale();
  args.eps = problem.eps;
  std::vector<device::AbsorbedShape> shapes;
  for (size_t j = 0; j < problem.features.size(); ++j) {
    const size_t encoder = problem.keys.size() + j;
    const bool* mask = problem.mask(encoder);
    shapes.push_back({problem.sizes.window[encoder], problem.sizes.channels[j], problem.positions[j].numel() > 0});
    device::AbsorbedEncoder<T>& at = args.encoder[j];
    at.features = static_cast<const T*>(problem.features[j].const_data_ptr());
    at.positions = data_or_null<T>(problem.positions[j]);
    at.absorbed = static_cast<const T*>(problem.absorbed[j].const_data_ptr());
    at.constants = floats(problem.constants[j]);
    at.mask = mask;
    at.pooled = data<T>(result.pooled[j]);
    at.mass = result.mass[j].mutable_data_ptr<float>();
    at.features_of_image = problem.features[j].stride(0);
    at.cells_of_image = mask == nullptr ? 0 : problem.masks[encoder].stride(0);
    at.window = static_cast<int>(problem.sizes.window[encoder]);
    at.channels = static_cast<int>(problem.sizes.channels[j]);
    if (!result.backward()) continue;
    at.grad_pooled = data_or_null<T>(result.grad_pooled[j]);
    at.grad_mass = floats(result.grad_mass[j]);
    at.grad_features = data<T>(result.grad_features[j]);
    at.grad_absorbed = data<T>(result.grad_absorbed[j]);
    at.grad_constants = result.grad_constants[j].mutable_data_ptr<float>();
  }
  // A block takes 1 KiB beyond what it asks for.
  const int64_t half = scope.shared_bytes_per_multiprocessor() / 2 - 1024;
  args.layout = device::absorbed_layout(shapes, problem.sizes.heads, sizeof(T), absorbed_fits_vectors(problem, result),
                                        result.backward(), scope.shared_bytes_per_block(), half);
  check(args.layout.bytes <= scope.shared_bytes_per_block(), "sva: q has too many heads for features on CUDA");
  return args;
}

// launch(the kernel's arguments, a T, blocks, whether the rows are staged as a type)
template <typename Launch>
void launch_absorbed(const DeviceScope& scope, const Problem& problem, const AbsorbedResult& result, Launch&& launch) {
  for_device_type(problem.q.scalar_type(), "sva: q", [&](auto type) {
    using T = decltype(type);
    const auto args = absorbed_args<T>(scope, problem, result);
    const int64_t blocks = std::min<int64_t>(
        problem.sizes.queries(),
        device::absorbed_blocks(scope.multiprocessors(), scope.shared_bytes_per_multiprocessor(), args.layout.bytes));
    if (args.layout.staged) {
      launch(args, type, static_cast<unsigned>(blocks), std::true_type{});
    } else {
      launch(args, type, static_cast<unsigned>(blocks), std::false_type{});
    }
  });
}

SvaResult sva_cuda(Tensor q, Tensors keys, Tensors values, Tensors features, Tensors positions, Tensors absorbed,
                   Tensors constants, Tensors masks, double eps) {
  const Problem problem(q, keys, values, features, positions, absorbed, constants, masks, eps);
  const DeviceScope scope(q);
  const SvaSizes& sizes = problem.sizes;
  const bool projects = !keys.empty(), absorbs = !features.empty();
  Tensor out = torch::stable::new_empty(q, {sizes.batch, sizes.rows, sizes.columns, problem.channels()});
  Tensor lse = torch::stable::new_empty(q, {sizes.batch, sizes.rows, sizes.columns, sizes.heads}, ScalarType::Float);
  const AbsorbedResult result = new_absorbed_result(problem);
  if (sizes.queries() == 0) return {out, lse, result.pooled, result.mass};
  if (!projects) torch::stable::zero_(out);
  // The two kinds of encoders share a softmax: the first pass over the keys tells the features' kernel what they add up
  // to, the second learns what the features add up to.
  Tensor lse_of_features = lse;
  if (projects && absorbs) {
    lse_of_features = new_like(lse);
    launch_projected(scope, problem, nullptr, nullptr, lse);
  }
  if (absorbs) {
    launch_absorbed(scope, problem, result, [&](const auto& args, auto type, unsigned blocks, auto staged) {
      auto* kernel = device::absorbed_kernel<decltype(type), staged()>;
      allow_shared(kernel, args.layout.bytes);
      MMOE_LAUNCH(kernel, blocks, device::kAbsorbedThreads, args.layout.bytes, scope.stream())
      (args, projects ? floats(lse) : nullptr, lse_of_features.mutable_data_ptr<float>());
    });
    check_launch("sva: absorbed_kernel");
  }
  if (projects) launch_projected(scope, problem, absorbs ? floats(lse_of_features) : nullptr, &out, lse);
  return {out, lse, result.pooled, result.mass};
}

SvaGradients sva_backward_cuda(Tensor grad_out_any, Tensors grad_pooled, Tensors grad_mass, Tensor q, Tensors keys,
                               Tensors values, Tensors features, Tensors positions, Tensors absorbed, Tensors constants,
                               Tensors masks, Tensor lse_any, double eps) {
  const Problem problem(q, keys, values, features, positions, absorbed, constants, masks, eps);
  check_sva_backward(problem.sizes, grad_out_any, grad_pooled, grad_mass, q, lse_any);
  const DeviceScope scope(q);
  const bool projects = !keys.empty(), absorbs = !features.empty();
  const Tensor grad_out = torch::stable::contiguous(grad_out_any), lse = torch::stable::contiguous(lse_any);
  Tensor grad_q = new_like(q);
  Tensors grad_keys, grad_values;
  for (const Tensor& grid : keys) {
    grad_keys.push_back(new_like(grid));
    grad_values.push_back(new_like(grid));
  }
  AbsorbedResult result = new_absorbed_result(problem);
  result.grad_pooled = contiguous(grad_pooled);
  result.grad_mass = contiguous(grad_mass);
  for (size_t j = 0; j < features.size(); ++j) {
    result.grad_features.push_back(new_like(features[j]));
    result.grad_absorbed.push_back(new_like(absorbed[j]));
    result.grad_constants.push_back(new_like(constants[j]));
  }
  const auto gradients = [&]() -> SvaGradients {
    return {grad_q,        grad_keys,  grad_values, result.grad_features, result.grad_absorbed, result.grad_constants,
            result.pooled, result.mass};
  };
  if (problem.sizes.queries() == 0) return gradients();
  if (!projects) torch::stable::zero_(grad_q);
  // As in the forward, with sum of a * da in place of lse.
  Tensor delta_of_keys = lse, delta_of_features = lse;
  if (projects && absorbs) {
    delta_of_keys = new_like(lse);
    delta_of_features = new_like(lse);
    launch_projected_backward(scope, problem, grad_out, lse, nullptr, nullptr, {}, {}, &delta_of_keys);
  }
  if (absorbs) {
    launch_absorbed(scope, problem, result, [&](const auto& args, auto type, unsigned blocks, auto staged) {
      auto* kernel = device::absorbed_backward_kernel<decltype(type), staged()>;
      allow_shared(kernel, args.layout.bytes);
      MMOE_LAUNCH(kernel, blocks, device::kAbsorbedThreads, args.layout.bytes, scope.stream())
      (args, floats(lse), projects ? floats(delta_of_keys) : nullptr,
       projects ? delta_of_features.mutable_data_ptr<float>() : nullptr);
    });
    check_launch("sva: absorbed_backward_kernel");
  }
  if (projects) {
    launch_projected_backward(scope, problem, grad_out, lse, absorbs ? floats(delta_of_features) : nullptr, &grad_q,
                              grad_keys, grad_values, nullptr);
  }
  return gradients();
}

}  // namespace

MMOE_CUDA(m) {
  m.impl("sva", TORCH_BOX(&sva_cuda));
  m.impl("sva_backward", TORCH_BOX(&sva_backward_cuda));
}

}  // namespace mmoe
