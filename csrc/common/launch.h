// What a launcher of CUDA kernels needs from torch and from the CUDA runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/checks.h"

namespace mmoe {

inline void check_cuda(cudaError_t status, const char* what) {
  check(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// The stream on which torch currently queues work for the device. Asked through torch's device-neutral call, which the
// CPU build of torch exports too, so that one library loads everywhere.
inline cudaStream_t current_stream(torch::stable::accelerator::DeviceIndex device) {
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
}

}  // namespace mmoe
