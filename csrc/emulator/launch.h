// Launches, and the calls of the CUDA runtime that launchers make. Everything runs at once: a launch returns when its
// last block has ended.
#pragma once

#include <driver_types.h>
#include <vector_types.h>

#include <cstddef>

#define MMOE_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  ::emulator::Launch(kernel, dim3(grid), dim3(block), static_cast<size_t>(shared_bytes))

namespace emulator {

struct Shape {
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_bytes;
};

// Runs call(arguments) on a fiber for every thread of the grid.
void launch(const Shape& shape, void (*call)(const void*), const void* arguments);

// A launch needs leave for more dynamic shared memory than every block may have.
void allow_dynamic_bytes(const void* kernel, size_t bytes);

// The number of multiprocessors of the device that is played.
int multiprocessors();

template <typename... Parameters>
class Launch {
 public:
  using Kernel = void (*)(Parameters...);

  Launch(Kernel kernel, dim3 grid, dim3 block, size_t dynamic_bytes)
      : kernel_(kernel), shape_{reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes} {}

  // As on a GPU, arguments become the kernel's parameter types here, and every thread has its own copy.
  void operator()(Parameters... arguments) const {
    const auto call = [&] { kernel_(arguments...); };
    launch(shape_, [](const void* it) { (*static_cast<decltype(&call)>(it))(); }, &call);
  }

 private:
  Kernel kernel_;
  Shape shape_;
};

}  // namespace emulator

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  emulator::allow_dynamic_bytes(reinterpret_cast<const void*>(kernel), static_cast<size_t>(value));
  return cudaSuccess;
}
