// Collectives of a warp. Each waits until every lane of the mask that has not exited calls the same function; none but
// __syncwarp orders memory.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <functional>

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

inline unsigned vote(const char* what, unsigned mask, bool predicate, Where where) {
  const Gathered<bool> gathered = gather(what, mask, predicate, where);
  unsigned votes = 0;
  for (int i = 0; i < warpSize; ++i) votes |= static_cast<unsigned>(gathered.lanes >> i & gathered.of_lane[i]) << i;
  return votes;
}

template <typename T, typename Combine>
T reduce(const char* what, unsigned mask, T value, Combine combine, Where where) {
  const Gathered<T> gathered = gather(what, mask, value, where);
  const int first = std::countr_zero(gathered.lanes);
  T reduced = gathered.of_lane[first];
  for (int i = first + 1; i < warpSize; ++i) {
    if (gathered.lanes >> i & 1) reduced = combine(reduced, gathered.of_lane[i]);
  }
  return reduced;
}

template <typename T>
concept Word = std::same_as<T, int> || std::same_as<T, unsigned>;

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
T __shfl_down_sync(unsigned mask, T value, unsigned reach, int width = warpSize,
                   emulator::Where where = emulator::Where::current()) {
  const unsigned lane = emulator::lane();
  const bool inside = (lane & (width - 1)) + reach < static_cast<unsigned>(width);
  return emulator::shuffle(__func__, mask, value, static_cast<int>(lane + reach), inside, width, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned reach, int width = warpSize,
                 emulator::Where where = emulator::Where::current()) {
  const unsigned lane = emulator::lane();
  const bool inside = (lane & (width - 1)) >= reach;
  return emulator::shuffle(__func__, mask, value, static_cast<int>(lane - reach), inside, width, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(__func__, mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(__func__, mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(__func__, mask, predicate == 0, where) == 0;
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

template <emulator::Word T>
T __reduce_add_sync(unsigned mask, T value, emulator::Where where = emulator::Where::current()) {
  // Wraps around, which int must not in C++.
  return static_cast<T>(emulator::reduce(__func__, mask, static_cast<unsigned>(value), std::plus{}, where));
}
template <emulator::Word T>
T __reduce_min_sync(unsigned mask, T value, emulator::Where where = emulator::Where::current()) {
  return emulator::reduce(__func__, mask, value, [](T a, T b) { return a < b ? a : b; }, where);
}
template <emulator::Word T>
T __reduce_max_sync(unsigned mask, T value, emulator::Where where = emulator::Where::current()) {
  return emulator::reduce(__func__, mask, value, [](T a, T b) { return a > b ? a : b; }, where);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, emulator::Where where = emulator::Where::current()) {
  return emulator::reduce(__func__, mask, value, std::bit_and{}, where);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, emulator::Where where = emulator::Where::current()) {
  return emulator::reduce(__func__, mask, value, std::bit_or{}, where);
}
