// Collectives of a warp. Each waits until every lane of the mask that has not exited calls the same function; none but
// __syncwarp orders memory.
#pragma once

#include <bit>
#include <cstddef>

#include "emulator/block.h"

namespace emulator {

constexpr size_t kPayload = 8;  // bytes that a lane brings to a collective

// Brings `size` bytes at `mine`; writes those of the lanes that came to all[32] and returns these lanes.
unsigned exchange(const char* what, unsigned mask, const void* mine, size_t size, void* all, Where where);

void sync_warp(unsigned mask, Where where);

template <typename T>
struct Gathered {
  T of_lane[warpSize];
  unsigned lanes;
};

template <typename T>
Gathered<T> gather(const char* what, unsigned mask, T value, Where where) {
  static_assert(sizeof(T) <= kPayload, "a collective takes values of at most 8 bytes");
  Gathered<T> gathered;
  gathered.lanes = exchange(what, mask, &value, sizeof(T), gathered.of_lane, where);
  return gathered;
}

// `source` may name a lane outside of the group of `width` lanes, which gives the own value.
template <typename T>
T shuffle(const char* what, unsigned mask, T value, int source, bool inside, int width, Where where) {
  if (width < 1 || width > warpSize || !std::has_single_bit(static_cast<unsigned>(width))) {
    fail("%s with width %d (%s:%u)", what, width, where.file_name(), where.line());
  }
  const Gathered<T> gathered = gather(what, mask, value, where);
  if (!inside) return value;
  if (!(gathered.lanes >> source & 1)) {
    fail("%s reads lane %d, which has exited or is not in the mask %08x (%s:%u)", what, source, mask, where.file_name(),
         where.line());
  }
  return gathered.of_lane[source];
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Where where = emulator::Where::current()) {
  emulator::sync_warp(mask, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulator::Where where = emulator::Where::current()) {
  const int first = static_cast<int>(emulator::lane()) & ~(width - 1);
  return emulator::shuffle(__func__, mask, value, first + (source & (width - 1)), true, width, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = warpSize,
                  emulator::Where where = emulator::Where::current()) {
  const int lane = static_cast<int>(emulator::lane());
  const int source = lane ^ flip;
  const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
  return emulator::shuffle(__func__, mask, value, source, inside, width, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned reach, int width = warpSize,
                 emulator::Where where = emulator::Where::current()) {
  const unsigned lane = emulator::lane();
  const bool inside = (lane & (width - 1)) >= reach;
  return emulator::shuffle(__func__, mask, value, static_cast<int>(lane - reach), inside, width, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
  const auto gathered = emulator::gather(__func__, mask, predicate != 0, where);
  unsigned votes = 0;
  for (int i = 0; i < warpSize; ++i) votes |= static_cast<unsigned>(gathered.lanes >> i & gathered.of_lane[i]) << i;
  return votes;
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, emulator::Where where = emulator::Where::current()) {
  const auto gathered = emulator::gather(__func__, mask, value, where);
  unsigned same = 0;
  for (int i = 0; i < warpSize; ++i) {
    if ((gathered.lanes >> i & 1) && gathered.of_lane[i] == value) same |= 1u << i;
  }
  return same;
}
