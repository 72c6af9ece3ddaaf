// What a thread shares with its block: indices, shared memory and barriers.
#pragma once

#include <driver_types.h>  // has fields of the names that are macros below
#include <vector_types.h>

#include <cstddef>
#include <source_location>

// Allocated per block and call site, not per variable of g++: filled with NaN, fenced for AddressSanitizer.
#define MMOE_SHARED(T, name, count) T* const name = static_cast<T*>(::emulator::shared_site([] {}, sizeof(T) * (count)))
#define MMOE_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::emulator::dynamic_shared())

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_shape())
#define gridDim (::emulator::grid_shape())

constexpr int warpSize = 32;

namespace emulator {

using Where = std::source_location;

// Ends the process with status 86 and one line that names the kernel, block and thread.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Out of line, so that a sanitizer sees no access; const, since they never change within a thread of the grid.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_shape();
[[gnu::const]] dim3 grid_shape();
[[gnu::const]] unsigned lane();

void* dynamic_shared();
void* shared_array(const void* site, size_t bytes);

template <typename Site>
void* shared_site(Site, size_t bytes) {
  static const char site = 0;
  return shared_array(&site, bytes);
}

// Waits for every thread of the block that has not exited.
void barrier(const char* what, Where where);

}  // namespace emulator

inline void __syncthreads(emulator::Where where = emulator::Where::current()) { emulator::barrier(__func__, where); }
