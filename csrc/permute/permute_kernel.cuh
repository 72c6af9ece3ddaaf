// permute_index on the device: a stable counting sort of slots by expert in three kernels. No torch in this file.
//
// Parallel over chunks of kSlotsPerChunk slots, one warp each. A warp takes 32 slots at a time in order and ranks the
// lanes of the same expert among each other with one __match_any_sync, so a slot's row depends on the slots before it
// alone: no atomics, the same result on every run. Bytes moved, for S slots of b bytes and C chunks: 2 S b for the ids,
// 8 S for the two results and 16 C experts for the counts; the floor is S b + 8 S.
//
// Compiled for sm_80, sm_90a and sm_100; not yet run on a GPU.
#pragma once

#include "common/device.cuh"

namespace mmoe::permute {

constexpr int kLanes = kWarp;
constexpr int kSlotsPerChunk = 1024;

// Calls place(slot, expert, rank, same) for every slot of the block's chunk, where `rank` counts the slots of the same
// expert before it among the 32 in hand and `same` is the number of them. Zero experts get expert = experts and
// negative ids expert = experts + 1. All lanes stay in the loop, because every step of it is a step of the whole warp;
// a lane past the end has slot = -1 and a key of its own.
template <typename Id, typename Place>
__device__ void for_each_slot(const Id* __restrict__ id_of_slot, int slots, int experts, Place place) {
  const int lane = static_cast<int>(threadIdx.x);
  const int begin = static_cast<int>(blockIdx.x) * kSlotsPerChunk;
  const int count = min(kSlotsPerChunk, slots - begin);
  for (int step = 0; step < count; step += kLanes) {
    const bool inside = step + lane < count;
    int expert = experts + 2;
    if (inside) {
      const Id id = id_of_slot[begin + step + lane];
      expert = id < 0 ? experts + 1 : id < experts ? static_cast<int>(id) : experts;
    }
    const unsigned same = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(same & ((1u << lane) - 1u));
    place(inside ? begin + step + lane : -1, expert, rank, __popc(same));
    __syncwarp();
  }
}

// counts[chunk][experts + 2] int32: the slots of each expert, then those of the zero experts, then the negative ids.
// <<<chunks, kLanes, (experts + 2) * sizeof(int)>>>
template <typename Id>
__global__ void __launch_bounds__(kLanes)
    count_kernel(const Id* __restrict__ id_of_slot, int slots, int experts, int* __restrict__ counts) {
  MMOE_DYNAMIC_SHARED(int, count);
  const int columns = experts + 2;
  for (int column = static_cast<int>(threadIdx.x); column < columns; column += kLanes) count[column] = 0;
  __syncwarp();
  for_each_slot(id_of_slot, slots, experts, [&](int slot, int expert, int rank, int same) {
    if (slot >= 0 && rank == 0) count[expert] += same;
  });
  int* row = counts + static_cast<int64_t>(blockIdx.x) * columns;
  for (int column = static_cast<int>(threadIdx.x); column < columns; column += kLanes) row[column] = count[column];
}

// Turns counts into the first row of each chunk and expert, in place, and fills offsets[experts + 1] and
// status[2] = {R, negative ids}. One warp walks the experts, 32 at a time. <<<1, kLanes>>>
__global__ void __launch_bounds__(kLanes) scan_kernel(int* __restrict__ counts, int chunks, int experts,
                                                      int* __restrict__ offsets, int* __restrict__ status) {
  const int lane = static_cast<int>(threadIdx.x);
  const int columns = experts + 2;
  int first_row = 0;
  for (int base = 0; base < experts; base += kLanes) {
    const int expert = base + lane;
    int total = 0;
    if (expert < experts) {
      for (int chunk = 0; chunk < chunks; ++chunk) total += counts[static_cast<int64_t>(chunk) * columns + expert];
    }
    int end = total;
    for (int reach = 1; reach < kLanes; reach *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, reach);
      if (lane >= reach) end += before;
    }
    if (expert < experts) {
      int row = first_row + end - total;
      offsets[expert] = row;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        int& place = counts[static_cast<int64_t>(chunk) * columns + expert];
        const int count = place;
        place = row;
        row += count;
      }
    }
    first_row += __shfl_sync(kAllLanes, end, kLanes - 1);
  }
  int negative = 0;
  for (int chunk = lane; chunk < chunks; chunk += kLanes) {
    negative += counts[static_cast<int64_t>(chunk) * columns + experts + 1];
  }
  for (int reach = kLanes / 2; reach > 0; reach /= 2) negative += __shfl_xor_sync(kAllLanes, negative, reach);
  if (lane == 0) {
    offsets[experts] = first_row;
    status[0] = first_row;
    status[1] = negative;
  }
}

// first_rows[chunk][experts + 2] from scan_kernel -> row_of_slot[slots], slot_of_row[R].
// <<<chunks, kLanes, experts * sizeof(int)>>>
template <typename Id>
__global__ void __launch_bounds__(kLanes)
    place_kernel(const Id* __restrict__ id_of_slot, int slots, int experts, const int* __restrict__ first_rows,
                 int* __restrict__ row_of_slot, int* __restrict__ slot_of_row) {
  MMOE_DYNAMIC_SHARED(int, next);
  const int* first = first_rows + static_cast<int64_t>(blockIdx.x) * (experts + 2);
  for (int expert = static_cast<int>(threadIdx.x); expert < experts; expert += kLanes) next[expert] = first[expert];
  __syncwarp();
  for_each_slot(id_of_slot, slots, experts, [&](int slot, int expert, int rank, int same) {
    const bool takes_row = slot >= 0 && expert < experts;
    const int row = takes_row ? next[expert] + rank : -1;
    if (slot >= 0) row_of_slot[slot] = row;
    if (takes_row) slot_of_row[row] = slot;
    // Every lane of the expert has read its cursor before the first of them moves it on.
    __syncwarp();
    if (takes_row && rank == 0) next[expert] += same;
  });
}

}  // namespace mmoe::permute
