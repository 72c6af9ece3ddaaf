// Launches of unpermute's kernels that permute's gradient shares.
#pragma once

#include "common/launch.h"
#include "permute/permute_heuristics.h"
#include "unpermute/unpermute_kernel.cuh"

namespace mmoe {

// Whether rows of `width` elements of T from each of the pointers on lie on the 16-byte grid.
template <typename T, typename... Pointers>
bool rows_on_grid(int64_t width, const Pointers*... bases) {
  return width % kVector<T> == 0 && ((reinterpret_cast<uintptr_t>(bases) % 16 == 0) && ...);
}

inline unsigned pad_blocks(int64_t rows) {
  return static_cast<unsigned>((rows + permute::kPadRows - 1) / permute::kPadRows);
}

// out [tokens, width]: the sum of each token's rows; see forward_kernel for what may be null.
template <typename T>
void launch_sum(const char* what, cudaStream_t stream, const T* rows, const int32_t* row_of_slot, const float* weights,
                const T* x, const float* identity, int64_t row_count, int64_t tokens, int64_t top_k, int64_t width,
                T* out) {
  if (tokens == 0 || width == 0) return;
  const bool vectors = rows_on_grid<T>(width, rows, x, out);
  auto* kernel = vectors ? unpermute::forward_kernel<T, true> : unpermute::forward_kernel<T, false>;
  const int64_t pieces = vectors ? width / kVector<T> : width;
  MMOE_LAUNCH(kernel, static_cast<unsigned>(tokens), row_threads(pieces, unpermute::kHeld), 0, stream)
  (rows, row_of_slot, weights, x, identity, static_cast<int>(row_count), static_cast<int>(top_k),
   static_cast<int>(pieces), out);
  check_launch(what);
}

}  // namespace mmoe
