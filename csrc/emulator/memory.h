// Accesses to memory beyond C++'s own: vectors checked for alignment, cache hints and atomics.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "emulator/block.h"
#include "emulator/counters.h"

namespace emulator {

inline void check_aligned(const char* what, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned %s of %zu bytes at %p", what, bytes, address);
}

// One access of sizeof(V) bytes, which must be aligned to as many.
template <typename V>
[[gnu::always_inline]] inline V load(const void* from) {
  check_aligned("load", from, sizeof(V));
  if constexpr (kCounted) {
    V value;
    counted_copy(&value, from, sizeof(V), false);
    return value;
  } else {
    return *static_cast<const V*>(from);
  }
}
template <typename V>
[[gnu::always_inline]] inline void store(void* to, V value) {
  check_aligned("store", to, sizeof(V));
  if constexpr (kCounted) {
    counted_copy(to, &value, sizeof(V), true);
  } else {
    *static_cast<V*>(to) = value;
  }
}

}  // namespace emulator

template <typename T>
[[gnu::always_inline]] inline T __ldg(const T* from) {
  return emulator::load<T>(from);
}
// Orders nothing but itself, as CUDA's.
template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  emulator::check_aligned("atomic", at, sizeof(T));
  if constexpr (emulator::kCounted) emulator::count_atomic();
  return std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}
