// permute_index on the device: a stable counting sort of slots by expert in three kernels. No torch in this file.
//
// count and place: parallel over chunks of kSlotsPerChunk slots, one warp each. A warp takes 32 slots at a time in
// order and ranks the lanes of the same expert among each other with one __match_any_sync, so a slot's row depends on
// the slots before it alone: no atomics, the same result on every run. The ids of kAhead steps are loaded before the
// first is used, since each step waits for the one before it.
//
// scan: one block of 32 warps, a thread per expert and segment of the chunks. For C chunks and N experts it makes
// 2 C / S coalesced steps for every 1024 experts, S = max(1, 32 / ceil(N / 32)) segments: 2 x 48 for 512 experts and 96
// chunks (T = 8192, k = 12), 2 x 1 for 16 experts and 32 chunks. A single warp over all experts would make 2 x 16 x 96.
//
// Bytes moved, for S slots of b bytes, C chunks, N experts and R rows: 2 S b for the ids, 4 S + 4 R for the results and
// 20 C N for the counts (C N = S / 2 for 512 experts); the floor is S b + 4 S + 4 R. Counts and ids come from the
// second-level cache the second time. slot_of_row is scattered, 4 bytes at a time.
//
// Compiled for sm_80, sm_90a and sm_100. Not yet run on a GPU.
#pragma once

#include "common/device.cuh"

namespace mmoe::permute_index {

constexpr int kSlotsPerChunk = 1024;
constexpr int kAhead = 8;
constexpr int kScanWarps = 32;
constexpr int kScanThreads = kScanWarps * kWarp;
constexpr int kPadBlocks = 32;

// The counts of a chunk: of each expert, then of the zero experts and of the negative ids, up to a whole sector.
__host__ __device__ constexpr int columns_of(int experts) { return (experts + 2 + 7) / 8 * 8; }

// Calls place(slot, expert, rank, same) for every slot of the block's chunk, where `rank` counts the slots of the same
// expert before it among the 32 in hand and `same` is the number of them. Zero experts get expert = experts and
// negative ids expert = experts + 1. All lanes stay in the loop, because every step of it is a step of the whole warp;
// a lane past the end has slot = -1 and a key of its own.
template <typename Id, typename Place>
__device__ void for_each_slot(const Id* __restrict__ id_of_slot, int slots, int experts, Place place) {
  const int lane = static_cast<int>(threadIdx.x);
  const int begin = static_cast<int>(blockIdx.x) * kSlotsPerChunk;
  const int end = min(begin + kSlotsPerChunk, slots);
  for (int first = begin; first < end; first += kAhead * kWarp) {
    int experts_ahead[kAhead];
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      const int slot = first + step * kWarp + lane;
      experts_ahead[step] = experts + 2;
      if (slot < end) {
        const Id id = id_of_slot[slot];
        experts_ahead[step] = id < 0 ? experts + 1 : id < experts ? static_cast<int>(id) : experts;
      }
    }
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      if (first + step * kWarp >= end) break;
      const int slot = first + step * kWarp + lane;
      const unsigned same = __match_any_sync(kAllLanes, experts_ahead[step]);
      const int rank = __popc(same & ((1u << lane) - 1u));
      place(slot < end ? slot : -1, experts_ahead[step], rank, __popc(same));
      __syncwarp();
    }
  }
}

// counts[chunk][columns_of(experts)]. <<<chunks, kWarp, columns_of(experts) * sizeof(int)>>>
template <typename Id>
__global__ void __launch_bounds__(kWarp)
    count_kernel(const Id* __restrict__ id_of_slot, int slots, int experts, int* __restrict__ counts) {
  MMOE_DYNAMIC_SHARED(int, count);
  const int columns = columns_of(experts);
  for (int column = static_cast<int>(threadIdx.x); column < columns; column += kWarp) count[column] = 0;
  __syncwarp();
  for_each_slot(id_of_slot, slots, experts, [&](int slot, int expert, int rank, int same) {
    if (slot >= 0 && rank == 0) count[expert] += same;
  });
  int* row = counts + static_cast<int64_t>(blockIdx.x) * columns;
  for (int column = static_cast<int>(threadIdx.x); column < columns; column += kWarp) row[column] = count[column];
}

// Inclusive sum over the lanes up to this one.
__device__ __forceinline__ int warp_running_sum(int value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int reach = 1; reach < kWarp; reach *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, reach);
    if (lane >= reach) value += before;
  }
  return value;
}

// Turns counts into the first row of each chunk and expert, in place, and fills offsets[experts + 1], ends[experts]
// (behind the last row of each expert that a slot takes) and status[2] = {R, negative ids}. Rows are not limited here;
// offsets are, to max_rows. <<<1, kScanThreads>>>
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(int* __restrict__ counts, int chunks, int experts, int align, int max_rows, int* __restrict__ offsets,
                int* __restrict__ ends, int* __restrict__ status) {
  MMOE_SHARED(int, segment_totals, kScanThreads);  // [warp][lane]
  MMOE_SHARED(int, tile_totals, kScanWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t columns = columns_of(experts);
  // Warp w works on tile w / segments of 32 experts and on the chunks of segment w % segments.
  const int tiles = min(kScanWarps, (experts + kWarp - 1) / kWarp);
  const int segments = kScanWarps / tiles;
  const int tile = warp / segments, segment = warp % segments;
  const int chunks_per_segment = (chunks + segments - 1) / segments;
  const int first_chunk = min(chunks, segment * chunks_per_segment);
  const int last_chunk = min(chunks, first_chunk + chunks_per_segment);

  int first_row = 0;
  for (int base = 0; base < experts; base += tiles * kWarp) {
    const int expert = base + tile * kWarp + lane;
    const bool mine = tile < tiles && expert < experts;
    int total = 0;
    if (mine) {
#pragma unroll 8
      for (int chunk = first_chunk; chunk < last_chunk; ++chunk) total += counts[chunk * columns + expert];
    }
    segment_totals[warp * kWarp + lane] = total;
    __syncthreads();
    int before = 0, slots = 0;
    for (int other = 0; other < segments && tile < tiles; ++other) {
      const int part = segment_totals[(tile * segments + other) * kWarp + lane];
      before += other < segment ? part : 0;
      slots += part;
    }
    const int run = (slots + align - 1) / align * align;
    const int run_end = warp_running_sum(run);
    if (segment == 0 && tile < tiles && lane == kWarp - 1) tile_totals[tile] = run_end;
    __syncthreads();
    int start = first_row + run_end - run;
    for (int other = 0; other < tiles; ++other) {
      start += other < tile ? tile_totals[other] : 0;
      first_row += tile_totals[other];
    }
    if (mine) {
      if (segment == 0) {
        offsets[expert] = min(start, max_rows);
        ends[expert] = start + slots;
      }
      int row = start + before;
      // All loads before the first store: the compiler must not move one past the other.
      for (int chunk = first_chunk; chunk < last_chunk; chunk += kAhead) {
        int ahead[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (chunk + i < last_chunk) ahead[i] = counts[(chunk + i) * columns + expert];
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (chunk + i >= last_chunk) break;
          counts[(chunk + i) * columns + expert] = row;
          row += ahead[i];
        }
      }
    }
    // tile_totals are read before the next round writes them.
    __syncthreads();
  }
  if (warp > 0) return;
  int negative = 0;
  for (int chunk = lane; chunk < chunks; chunk += kWarp) negative += counts[chunk * columns + experts + 1];
  for (int reach = kWarp / 2; reach > 0; reach /= 2) negative += __shfl_xor_sync(kAllLanes, negative, reach);
  if (lane == 0) {
    offsets[experts] = min(first_row, max_rows);
    status[0] = first_row;
    status[1] = negative;
  }
}

// -1 in the rows that no slot takes: those of every expert's padding, a warp each, and those behind the last run.
__device__ void fill_padding(int block, int experts, int rows, const int* __restrict__ offsets,
                             const int* __restrict__ ends, int* __restrict__ slot_of_row) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int expert = block; expert < experts; expert += kPadBlocks) {
    for (int row = ends[expert] + lane; row < offsets[expert + 1]; row += kWarp) slot_of_row[row] = -1;
  }
  for (int row = offsets[experts] + block * kWarp + lane; row < rows; row += kPadBlocks * kWarp) {
    slot_of_row[row] = -1;
  }
}

// first_rows[chunk][columns_of(experts)] from scan_kernel -> row_of_slot[slots], slot_of_row[rows]. A row >= rows is
// dropped. Blocks from `chunks` on fill the padding. <<<chunks + kPadBlocks or chunks, kWarp, experts * sizeof(int)>>>
template <typename Id>
__global__ void __launch_bounds__(kWarp)
    place_kernel(const Id* __restrict__ id_of_slot, int slots, int chunks, int experts, int rows,
                 const int* __restrict__ first_rows, const int* __restrict__ offsets, const int* __restrict__ ends,
                 int* __restrict__ row_of_slot, int* __restrict__ slot_of_row) {
  MMOE_DYNAMIC_SHARED(int, next);
  const int block = static_cast<int>(blockIdx.x);
  if (block >= chunks) {
    fill_padding(block - chunks, experts, rows, offsets, ends, slot_of_row);
    return;
  }
  const int* first = first_rows + static_cast<int64_t>(block) * columns_of(experts);
  for (int expert = static_cast<int>(threadIdx.x); expert < experts; expert += kWarp) next[expert] = first[expert];
  __syncwarp();
  for_each_slot(id_of_slot, slots, experts, [&](int slot, int expert, int rank, int same) {
    const bool takes_row = slot >= 0 && expert < experts;
    const int row = takes_row ? next[expert] + rank : rows;
    if (slot >= 0) row_of_slot[slot] = row < rows ? row : -1;
    if (row < rows) slot_of_row[row] = slot;
    // Every lane of the expert has read its cursor before the first of them moves it on.
    __syncwarp();
    if (takes_row && rank == 0) next[expert] += same;
  });
}

}  // namespace mmoe::permute_index
