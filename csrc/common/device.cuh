// The dialect of CUDA that every *_kernel.cuh is written in: nvcc compiles it for a GPU, g++ with MMOE_EMULATED runs
// the same source on the CPU (csrc/emulator). What differs between the two is named here:
//   MMOE_LAUNCH(kernel, grid, block, shared_bytes, stream)(arguments...)
//   MMOE_SHARED(T, name, count)      T name[count] in shared memory, 16-byte aligned
//   MMOE_DYNAMIC_SHARED(T, name)     T* name, the launch's shared_bytes, 16-byte aligned
// and inline PTX is wrapped, a function for each instruction with a twin in the emulator.
#pragma once

#include <cstdint>

#ifdef MMOE_EMULATED
#include "emulator/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#define MMOE_LAUNCH(kernel, grid, block, shared_bytes, stream) kernel<<<grid, block, shared_bytes, stream>>>
#define MMOE_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define MMOE_DYNAMIC_SHARED(T, name)                              \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared)
#endif

namespace mmoe {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace mmoe
