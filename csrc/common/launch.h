// What a launcher of CUDA kernels needs from torch and from the CUDA runtime, or from the emulator in their place.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "common/checks.h"
#include "common/shared_memory.h"
#include "common/vector.cuh"

namespace mmoe {

#ifdef MMOE_EMULATED

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return emulator::multiprocessors(); }
  int shared_bytes_per_block() const { return 227 * 1024; }
  int shared_bytes_per_multiprocessor() const { return 228 * 1024; }
};

// The emulator ends the process with a line of its own.
inline void check_cuda(cudaError_t, const char*) {}
inline void check_launch(const char*) {}

inline void wait_for(const DeviceScope&, void* host, const void* device, size_t bytes, const char*) {
  std::memcpy(host, device, bytes);
}

#else

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch's check would find it once more
  check(false, what, ": ", cudaGetErrorString(status));
}

inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// Makes the tensor's device current for the life of the object.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(tensor.get_device_index()) {}

  // The stream on which torch currently queues work for the device. Asked through torch's device-neutral call, which
  // the CPU build of torch exports too, so that one library loads everywhere.
  cudaStream_t stream() const {
    return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device_).nativeHandle());
  }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  // What one block can have at most, after allow_shared, and what all blocks of a multiprocessor share.
  int shared_bytes_per_block() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int shared_bytes_per_multiprocessor() const { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device_), "cudaDeviceGetAttribute");
    return value;
  }

  torch::stable::accelerator::DeviceIndex device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Copies from the device and waits for the stream: the host stands still until all that was queued is done.
inline void wait_for(const DeviceScope& scope, void* host, const void* device, size_t bytes, const char* what) {
  check_cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, scope.stream()), what);
  check_cuda(cudaStreamSynchronize(scope.stream()), what);
}

#endif

// Lets every launch of the kernel, which must have no static shared memory, have all the dynamic that a block can get;
// without, kSharedByDefault is the most. Never the bytes of one launch: another thread's may come before it.
template <typename Kernel>
void allow_shared(const DeviceScope& scope, Kernel* kernel) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, scope.shared_bytes_per_block()),
             "cudaFuncSetAttribute");
}

// Whether rows of `width` elements of T from each of the pointers on lie on the 16-byte grid.
template <typename T, typename... Pointers>
bool rows_on_grid(int64_t width, const Pointers*... bases) {
  return width % kVector<T> == 0 && ((reinterpret_cast<uintptr_t>(bases) % 16 == 0) && ...);
}

// Calls body(T{}) with the device type of a tensor's dtype.
template <typename Body>
void for_device_type(torch::headeronly::ScalarType dtype, const char* what, Body&& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    case ScalarType::Half:
      return body(__half{});
    default:
      check(false, what, " must be float32, bfloat16 or float16 on CUDA");
  }
}

}  // namespace mmoe
