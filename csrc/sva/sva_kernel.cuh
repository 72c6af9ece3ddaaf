// What the kernels of sva share: where a query's window lies in a grid and which of its cells count. No torch in this
// file. The kernels: sva_kernel_projected.cuh (keys and values given) and sva_kernel_absorbed.cuh (features given).
#pragma once

#include "common/device.cuh"
#include "sva/sva_heuristics.h"

namespace mmoe::sva {

// The grid of queries, R x W an image.
struct Queries {
  int rows, columns;
  int heads, width;
};

struct Query {
  int index;  // in [B, R, W]
  int image, row, column;
};

__device__ __forceinline__ Query query_at(const Queries& queries, unsigned index) {
  const unsigned columns = static_cast<unsigned>(queries.columns), rows = static_cast<unsigned>(queries.rows);
  const unsigned line = index / columns, image = line / rows;
  return {static_cast<int>(index), static_cast<int>(image), static_cast<int>(line - image * rows),
          static_cast<int>(index - line * columns)};
}

// The row of an image's grid [m*R, m*W] that holds a cell of the query's window, 0 <= cell < m*m.
__device__ __forceinline__ int row_of_cell(const Queries& queries, const Query& query, int m, int cell) {
  const int down = cell / m, right = cell - down * m;
  return (query.row * m + down) * (queries.columns * m) + query.column * m + right;
}

// The cells of the query's window that count, a bit each: the True ones, or all where none is. For a whole warp.
__device__ __forceinline__ unsigned long long valid_cells(const Queries& queries, const Query& query, int m,
                                                          const bool* __restrict__ mask, int64_t image_stride) {
  const int cells = m * m, lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned long long all = ~0ull >> (64 - cells);
  if (mask == nullptr) return all;
  const bool* image = mask + query.image * image_stride;
  unsigned long long valid = 0;
  for (int first = 0; first < cells; first += kWarp) {
    const int cell = first + lane;
    const bool counts = cell < cells && image[row_of_cell(queries, query, m, cell)];
    valid |= static_cast<unsigned long long>(__ballot_sync(kAllLanes, counts)) << first;
  }
  return valid == 0 ? all : valid;
}

}  // namespace mmoe::sva
