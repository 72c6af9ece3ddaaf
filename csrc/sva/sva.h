// sva: every query of a grid attends to its own window of several encoders' grids, through one softmax over all of them
// (Cambrian-1's Spatial Vision Aggregator, arXiv 2406.16860). An encoder is projected (keys and values given) or
// absorbed (features given: the projections are folded into the query before and into the sum after).
//
//   q            [B, R, W, H, D]: R x W queries a image, H heads; any D >= 1
//   keys[i]      [B, m*R, m*W, H*D], one per projected encoder, each with its own 1 <= m <= 8; values[i] alike
//   features[j]  [B, m*R, m*W, C], one per absorbed encoder, each with its own m and C >= 1
//   positions[j] [m*m, C], row-major within the window, or 0 elements for none
//   absorbed[j]  [H, B, R, W, C]: W_k^T q of a head, times the weight of the keys' LayerNorm
//   constants[j] [H, B, R, W], float32 (float64 for float64): q . W_k beta_k, with the LayerNorm's bias beta_k
//   masks        one per encoder, projected before absorbed: [B, m*R, m*W] bool, or 0 elements for none
//   eps          of the LayerNorm; 1 to 16 encoders in all
// Everything else has the dtype of q: float32, bfloat16 (float64 on the CPU, float16 on CUDA). Grids (keys, values,
// features, masks) are read in place where every image is contiguous, whatever the stride between images (a slice of
// the rows of larger grids); what is laid out otherwise is copied first.
//
// The query (r, c) owns the rows r*m .. r*m + m - 1 and the columns c*m .. c*m + m - 1 of a grid. A key's score is
// q.k / sqrt(D), or (absorbed.x^ + constant) / sqrt(D), where x^ = (x - mean) / sqrt(variance + eps) over the channels
// of x = features + position; a is the softmax over the keys of all encoders. A False key takes no part, whatever it
// holds, except that a window of an encoder without a True key counts as all True for that encoder.
// ->
//   out       [B, R, W, H*D], dtype of q: sum of a * value over the projected encoders
//   lse       [B, R, W, H], float32 (float64): log of the sum of exp(score)
//   pooled[j] [H, B, R, W, C], dtype of q: sum of a * x^
//   mass[j]   [H, B, R, W], float32 (float64): sum of a over that encoder's keys
//
// backward: the gradients of q, keys, values, features, absorbed and constants from those of out, pooled and mass (0
// elements for one that is missing), and pooled and mass once more: the caller needs them for the gradient of the
// projection after the sum and need not keep them. Windows are disjoint, so every gradient is written once, by the
// query that owns it. lse is not differentiated. A position's gradient is the sum of the features' gradient over the
// windows, left to the caller.
//
// RuntimeError: naming the argument of another shape or dtype.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/arguments.h"
#include "sva/sva_limits.h"

namespace mmoe {

using Tensors = std::vector<Tensor>;

// out, lse, pooled, mass.
using SvaResult = std::tuple<Tensor, Tensor, Tensors, Tensors>;
// The gradients of q, keys, values, features, absorbed and constants, then pooled and mass.
using SvaGradients = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors>;

struct SvaSizes {
  int64_t batch, rows, columns, heads, width;
  std::vector<int64_t> window;    // m of every encoder, projected before absorbed
  std::vector<int64_t> channels;  // C of every absorbed encoder

  int64_t queries() const { return batch * rows * columns; }
};

// True where the tensor can be read with its own batch stride: dense in memory from the second dimension on.
inline bool sva_dense_images(const Tensor& grid) {
  int64_t expected = 1;
  for (int64_t i = grid.dim() - 1; i >= 1; --i) {
    if (grid.size(i) != 1 && grid.stride(i) != expected) return false;
    expected *= grid.size(i);
  }
  return true;
}

// The grid itself, or a contiguous copy where it cannot be read in place.
inline Tensor sva_readable(const Tensor& grid) {
  return sva_dense_images(grid) ? grid : torch::stable::contiguous(grid);
}

namespace detail {

// m of a grid whose shape starts with [B, m*R, m*W].
inline int64_t sva_window(const Tensor& grid, const SvaSizes& sizes, const char* name, size_t i) {
  const int64_t m = grid.dim() == 4 && sizes.rows > 0 ? grid.size(1) / sizes.rows : 0;
  check(m >= 1 && m <= kSvaWindow, "sva: ", name, "[", i, "] must be [B, m*R, m*W, channels] with 1 <= m <= 8");
  return m;
}

}  // namespace detail

inline SvaSizes check_sva(const Tensor& q, const Tensors& keys, const Tensors& values, const Tensors& features,
                          const Tensors& positions, const Tensors& absorbed, const Tensors& constants,
                          const Tensors& masks) {
  check(q.dim() == 5 && q.size(1) >= 1 && q.size(2) >= 1 && q.size(3) >= 1 && q.size(4) >= 1,
        "sva: q must be [B, R, W, H, D] with R, W, H, D >= 1");
  SvaSizes sizes{q.size(0), q.size(1), q.size(2), q.size(3), q.size(4), {}, {}};
  const ScalarType dtype = q.scalar_type(), sums = sum_type(dtype);
  const int64_t batch = sizes.batch, rows = sizes.rows, columns = sizes.columns, heads = sizes.heads;
  const size_t encoders = keys.size() + features.size();
  check(encoders >= 1 && encoders <= kSvaEncoders, "sva: keys and features must be 1 to ", kSvaEncoders, " encoders");
  check(values.size() == keys.size(), "sva: values must be as many as keys, ", keys.size());
  check(positions.size() == features.size(), "sva: positions must be as many as features, ", features.size());
  check(absorbed.size() == features.size(), "sva: absorbed must be as many as features, ", features.size());
  check(constants.size() == features.size(), "sva: constants must be as many as features, ", features.size());
  check(masks.size() == encoders, "sva: masks must be one per encoder, ", encoders);
  for (size_t i = 0; i < keys.size(); ++i) {
    const int64_t m = detail::sva_window(keys[i], sizes, "keys", i), channels = heads * sizes.width;
    check_tensor("sva", keys[i], dtype, {batch, m * rows, m * columns, channels}, "keys[", i, "]");
    check_tensor("sva", values[i], dtype, {batch, m * rows, m * columns, channels}, "values[", i, "]");
    sizes.window.push_back(m);
  }
  for (size_t j = 0; j < features.size(); ++j) {
    const int64_t m = detail::sva_window(features[j], sizes, "features", j), channels = features[j].size(3);
    check(channels >= 1, "sva: features[", j, "] must have a channel");
    check_tensor("sva", features[j], dtype, {batch, m * rows, m * columns, channels}, "features[", j, "]");
    if (positions[j].numel() > 0) check_tensor("sva", positions[j], dtype, {m * m, channels}, "positions[", j, "]");
    check_tensor("sva", absorbed[j], dtype, {heads, batch, rows, columns, channels}, "absorbed[", j, "]");
    check_tensor("sva", constants[j], sums, {heads, batch, rows, columns}, "constants[", j, "]");
    sizes.window.push_back(m);
    sizes.channels.push_back(channels);
  }
  for (size_t i = 0; i < encoders; ++i) {
    const int64_t m = sizes.window[i];
    if (masks[i].numel() == 0) continue;
    check_tensor("sva", masks[i], ScalarType::Bool, {batch, m * rows, m * columns}, "masks[", i, "]");
  }
  return sizes;
}

// What the backward takes beyond the forward's arguments.
inline void check_sva_backward(const SvaSizes& sizes, const Tensor& grad_out, const Tensors& grad_pooled,
                               const Tensors& grad_mass, const Tensor& q, const Tensor& lse) {
  const ScalarType dtype = q.scalar_type(), sums = sum_type(dtype);
  const int64_t batch = sizes.batch, rows = sizes.rows, columns = sizes.columns, heads = sizes.heads;
  const size_t absorbed = sizes.channels.size();
  check(grad_pooled.size() == absorbed, "sva: grad_pooled must be as many as features, ", absorbed);
  check(grad_mass.size() == absorbed, "sva: grad_mass must be as many as features, ", absorbed);
  if (grad_out.numel() > 0)
    check_tensor("sva", grad_out, dtype, {batch, rows, columns, heads * sizes.width}, "grad_out");
  for (size_t j = 0; j < absorbed; ++j) {
    const int64_t channels = sizes.channels[j];
    if (grad_pooled[j].numel() > 0) {
      check_tensor("sva", grad_pooled[j], dtype, {heads, batch, rows, columns, channels}, "grad_pooled[", j, "]");
    }
    if (grad_mass[j].numel() > 0) {
      check_tensor("sva", grad_mass[j], sums, {heads, batch, rows, columns}, "grad_mass[", j, "]");
    }
  }
  check_tensor("sva", lse, sums, {batch, rows, columns, heads}, "lse");
}

}  // namespace mmoe
