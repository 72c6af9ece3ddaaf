// What the launchers of sva's CUDA kernels share: the problem as they see it, and the launchers themselves.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "sva/sva.h"
#include "sva/sva_kernel.cuh"

namespace mmoe::sva {

inline Tensors contiguous(const Tensors& tensors) {
  Tensors made;
  for (const Tensor& tensor : tensors) made.push_back(torch::stable::contiguous(tensor));
  return made;
}

inline Tensors readable(const Tensors& grids) {
  Tensors made;
  for (const Tensor& grid : grids) made.push_back(grid.numel() > 0 ? sva_readable(grid) : grid);
  return made;
}

// What both directions need of the arguments. Holds the tensors that are read, so that copies live long enough.
struct Problem {
  SvaSizes sizes;
  Queries queries;
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
    check(sizes.width <= kWidestHead, "sva: q must have heads of at most ", kWidestHead, " on CUDA");
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

inline bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

inline bool aligned(const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return aligned(tensor); });
}

// Images too start on 16 bytes.
inline bool aligned_images(const Tensor& grid, int64_t element_bytes) {
  return aligned(grid) && (grid.size(0) == 1 || grid.stride(0) * element_bytes % 16 == 0);
}

inline int64_t bytes_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

inline Tensor new_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, tensor.sizes()); }

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline const float* floats(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.const_data_ptr<float>();
}

// What the kernels over absorbed encoders write, and read beyond the forward's arguments in the backward.
struct AbsorbedResult {
  Tensors pooled, mass;
  Tensors grad_pooled, grad_mass;  // given
  Tensors grad_features, grad_absorbed, grad_constants;

  bool backward() const { return !grad_features.empty(); }
};

// sva_projected_cuda.cu. Without `out`, the forward stops at lse; without `grad_q`, the backward stops at delta.
// `others`: of the absorbed encoders, or null.
void launch_projected(const DeviceScope& scope, const Problem& problem, const float* others, const Tensor* out,
                      Tensor& lse);
void launch_projected_backward(const DeviceScope& scope, const Problem& problem, const Tensor& grad_out,
                               const Tensor& lse, const float* others, const Tensor* grad_q, const Tensors& grad_keys,
                               const Tensors& grad_values, Tensor* delta);

// sva_absorbed_cuda.cu. `others`: of the projected encoders, or null; then `delta` is null too.
void launch_absorbed(const DeviceScope& scope, const Problem& problem, const AbsorbedResult& result,
                     const float* others, float* lse);
void launch_absorbed_backward(const DeviceScope& scope, const Problem& problem, const AbsorbedResult& result,
                              const float* lse, const float* others, float* delta);

}  // namespace mmoe::sva
