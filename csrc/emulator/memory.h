// Accesses to memory beyond C++'s own: vectors checked for alignment, cache hints, atomics and fences.
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

// Atomics order nothing but themselves, as CUDA's.
template <typename T, typename Update>
T update(T* at, Update updated) {
  check_aligned("atomic", at, sizeof(T));
  if constexpr (kCounted) count_atomic();
  std::atomic_ref<T> atomic(*at);
  T old = atomic.load(std::memory_order_relaxed);
  while (!atomic.compare_exchange_weak(old, updated(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace emulator

template <typename T>
[[gnu::always_inline]] inline T __ldg(const T* from) {
  return emulator::load<T>(from);
}
template <typename T>
[[gnu::always_inline]] inline T __ldcs(const T* from) {
  return emulator::load<T>(from);
}
template <typename T>
[[gnu::always_inline]] inline T __ldcg(const T* from) {
  return emulator::load<T>(from);
}
template <typename T>
[[gnu::always_inline]] inline void __stcs(T* to, std::type_identity_t<T> value) {
  emulator::store(to, value);
}
template <typename T>
[[gnu::always_inline]] inline void __stcg(T* to, std::type_identity_t<T> value) {
  emulator::store(to, value);
}

template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  return emulator::update(at, [value](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicSub(T* at, std::type_identity_t<T> value) {
  return emulator::update(at, [value](T old) { return static_cast<T>(old - value); });
}
template <typename T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  return emulator::update(at, [value](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  return emulator::update(at, [value](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicAnd(T* at, std::type_identity_t<T> value) {
  return emulator::update(at, [value](T old) { return old & value; });
}
template <typename T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  return emulator::update(at, [value](T old) { return old | value; });
}
template <typename T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  return emulator::update(at, [value](T) { return value; });
}
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulator::update(at, [=](T old) { return old == expected ? value : old; });
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { __threadfence(); }
