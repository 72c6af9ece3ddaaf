// CUDA for g++: what *_kernel.cuh and *_cuda.cu need of the language and of the runtime, run on the CPU. The macros are
// those of csrc/common/device.cuh; a name of CUDA that no kernel here has needed yet does not compile or link.
//   launch.h      MMOE_LAUNCH, the runtime's calls
//   block.h       threadIdx and its kin, shared memory, barriers
//   warp.h        shuffles, votes, matches
//   memory.h      checked vector accesses, cache hints, atomics
//   intrinsics.h  arithmetic
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

// CUDA's headers make these attributes that g++ does not know.
#undef __constant__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __constant__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
// A variable of g++ would live on one thread's stack.
#define __shared__ _Pragma("GCC error \"shared memory is declared with MMOE_SHARED or MMOE_DYNAMIC_SHARED\"")

#include "emulator/block.h"
#include "emulator/intrinsics.h"
#include "emulator/launch.h"
#include "emulator/memory.h"
#include "emulator/warp.h"
