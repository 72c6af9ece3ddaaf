// sva on CUDA: launches over absorbed encoders.
#include "sva/sva_kernel_absorbed.cuh"
#include "sva/sva_kernel_absorbed_backward.cuh"
#include "sva/sva_launch.h"

namespace mmoe::sva {
namespace {

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
Absorbed<T> absorbed_args(const DeviceScope& scope, const Problem& problem, const AbsorbedResult& result) {
  Absorbed<T> args = {};
  args.encoders = static_cast<int>(problem.features.size());
  args.queries = problem.queries;
  args.count = static_cast<int>(problem.sizes.queries());
  args.scale = problem.scale();
  args.eps = problem.eps;
  std::vector<AbsorbedShape> shapes;
  for (size_t j = 0; j < problem.features.size(); ++j) {
    const size_t encoder = problem.keys.size() + j;
    const bool* mask = problem.mask(encoder);
    shapes.push_back({problem.sizes.window[encoder], problem.sizes.channels[j], problem.positions[j].numel() > 0});
    AbsorbedEncoder<T>& at = args.encoder[j];
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
  args.layout = absorbed_layout(shapes, problem.sizes.heads, sizeof(T), absorbed_fits_vectors(problem, result),
                                result.backward(), scope.shared_bytes_per_block(), half);
  check(args.layout.bytes <= scope.shared_bytes_per_block(), "sva: q has too many heads for features on CUDA");
  return args;
}

// launch(the kernel's arguments, a T, whether x^ is staged as a type, blocks)
template <typename Launch>
void for_absorbed(const DeviceScope& scope, const Problem& problem, const AbsorbedResult& result, Launch&& launch) {
  for_device_type(problem.q.scalar_type(), "sva: q", [&](auto type) {
    const auto args = absorbed_args<decltype(type)>(scope, problem, result);
    const unsigned blocks = static_cast<unsigned>(absorbed_blocks(
        problem.sizes.queries(), scope.multiprocessors(), scope.shared_bytes_per_multiprocessor(), args.layout.bytes));
    if (args.layout.staged) {
      launch(args, type, std::true_type{}, blocks);
    } else {
      launch(args, type, std::false_type{}, blocks);
    }
  });
}

}  // namespace

void launch_absorbed(const DeviceScope& scope, const Problem& problem, const AbsorbedResult& result,
                     const float* others, float* lse) {
  for_absorbed(scope, problem, result, [&](const auto& args, auto type, auto staged, unsigned blocks) {
    auto* kernel = absorbed_kernel<decltype(type), staged()>;
    allow_shared(scope, kernel);
    MMOE_LAUNCH(kernel, blocks, kAbsorbedThreads, args.layout.bytes, scope.stream())(args, others, lse);
  });
  check_launch("sva: absorbed_kernel");
}

void launch_absorbed_backward(const DeviceScope& scope, const Problem& problem, const AbsorbedResult& result,
                              const float* lse, const float* others, float* delta) {
  for_absorbed(scope, problem, result, [&](const auto& args, auto type, auto staged, unsigned blocks) {
    auto* kernel = absorbed_backward_kernel<decltype(type), staged()>;
    allow_shared(scope, kernel);
    MMOE_LAUNCH(kernel, blocks, kAbsorbedThreads, args.layout.bytes, scope.stream())(args, lse, others, delta);
  });
  check_launch("sva: absorbed_backward_kernel");
}

}  // namespace mmoe::sva
