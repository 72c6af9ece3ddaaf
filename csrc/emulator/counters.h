// The `counted` build: memory traffic as a profiler shows it. Its kernels are compiled with the calls that g++ makes
// for ThreadSanitizer, and counters.cpp answers them.
#pragma once

#include <cstddef>

namespace emulator {

#ifdef MMOE_EMULATED_COUNTED
constexpr bool kCounted = true;
#else
constexpr bool kCounted = false;
#endif

// An access of up to 16 bytes at once, which g++ would report in parts.
void counted_copy(void* to, const void* from, size_t bytes, bool store);

void count_atomic();
void count_barrier();

// Adds what the block did to its kernel's counters.
void count_block();

}  // namespace emulator
