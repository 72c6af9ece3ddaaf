// What the runtime tells the sanitizers, and memory operations that they do not see. The runtime itself is compiled
// without instrumentation; where there is no sanitizer all of this is nothing.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#ifdef MMOE_EMULATED_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef MMOE_EMULATED_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator {

// One side of a switch of stacks: a fiber, or the OS thread that schedules it.
struct Side {
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* context = nullptr;     // ThreadSanitizer's
};

inline void begin_switch(Side& from, const Side& to, bool for_good = false) {
#ifdef MMOE_EMULATED_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef MMOE_EMULATED_TSAN
  // Without synchronisation: that one fiber runs after another must order nothing.
  __tsan_switch_to_fiber(to.context, __tsan_switch_to_fiber_no_sync);
#endif
}

inline void end_switch(Side& to, Side& from) {
#ifdef MMOE_EMULATED_ASAN
  __sanitizer_finish_switch_fiber(to.fake_stack, &from.stack, &from.stack_bytes);
#endif
}

inline void* create_context() {
#ifdef MMOE_EMULATED_TSAN
  return __tsan_create_fiber(0);
#else
  return nullptr;
#endif
}

inline void* current_context() {
#ifdef MMOE_EMULATED_TSAN
  return __tsan_get_current_fiber();
#else
  return nullptr;
#endif
}

inline void destroy_context(void* context) {
#ifdef MMOE_EMULATED_TSAN
  __tsan_destroy_fiber(context);
#endif
}

// An order between threads: what happened before release is seen after acquire.
using Clock = uint64_t;

inline void release(Clock* clock) {
#ifdef MMOE_EMULATED_TSAN
  __tsan_release(clock);
#endif
}

inline void acquire(Clock* clock) {
#ifdef MMOE_EMULATED_TSAN
  __tsan_acquire(clock);
#endif
}

inline void forbid(const void* address, size_t bytes) {
#ifdef MMOE_EMULATED_ASAN
  __asan_poison_memory_region(address, bytes);
#endif
}

inline void permit(const void* address, size_t bytes) {
#ifdef MMOE_EMULATED_ASAN
  __asan_unpoison_memory_region(address, bytes);
#endif
}

// Volatile, or the compiler makes them calls to memcpy and memset, which the sanitizers watch.
inline void copy_unseen(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = static_cast<const char*>(from)[i];
}
inline void fill_unseen(void* to, unsigned char value, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(to)[i] = value;
}

// Memory of a block, used again by the next one. ThreadSanitizer must take it for new, or it would see accesses of two
// blocks race and, through the clocks in it, orders between blocks that do not exist; mapping it anew does that.
class BlockMemory {
 public:
  BlockMemory() = default;
  BlockMemory(const BlockMemory&) = delete;
  BlockMemory& operator=(const BlockMemory&) = delete;
  ~BlockMemory() { unmap(); }

  // True where the memory is new and so all zeros.
  bool renew(size_t bytes) {
#ifdef MMOE_EMULATED_TSAN
    unmap();
#endif
    if (bytes_ >= bytes) return false;
    unmap();
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) __builtin_trap();
    start_ = static_cast<char*>(mapped);
    bytes_ = bytes;
    return true;
  }
  char* start() const { return start_; }
  bool contains(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - start_) < bytes_;
  }

 private:
  void unmap() {
    if (bytes_ == 0) return;
    permit(start_, bytes_);
    munmap(start_, bytes_);
    bytes_ = 0;
  }

  char* start_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace emulator
