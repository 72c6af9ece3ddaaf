// Kernels with one planted bug each, and clean ones: what tests/emulated/test_emulator.py runs, without torch. Every
// launcher works on heap memory of its own and returns a sum for the test to look at.
#include <numeric>
#include <vector>

#include "common/device.cuh"

namespace mmoe::planted {

constexpr int kThreads = 64;

__global__ void clean_kernel(const float4* in, float* total, int* arrivals) {
  MMOE_SHARED(float, of_warp, kThreads / kWarp);
  MMOE_DYNAMIC_SHARED(float, row);
  const int thread = threadIdx.x, lane = thread % kWarp;
  const float4 value = emulator::load<float4>(in + blockIdx.x * kThreads + thread);
  row[thread] = value.x + value.y + value.z + value.w;
  __syncwarp();
  float sum = row[thread ^ 1];
  for (int reach = kWarp / 2; reach > 0; reach /= 2) sum += __shfl_xor_sync(kAllLanes, sum, reach);
  if (lane == 0) of_warp[thread / kWarp] = sum;
  __syncthreads();
  if (thread == 0) {
    atomicAdd(total, of_warp[0] + of_warp[1]);
    atomicAdd(arrivals, 1);
  }
}

template <bool kSync>
__global__ void reverse_kernel(float* out) {
  MMOE_SHARED(float, row, kThreads);
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kSync) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

__global__ void missing_syncwarp_kernel(float* out) {
  MMOE_SHARED(float, row, kWarp);
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  // A shuffle makes the lanes meet, but orders no memory.
  const float other = __shfl_xor_sync(kAllLanes, 1.0f, 1);
  out[threadIdx.x] = other * row[kWarp - 1 - threadIdx.x];
}

// The lanes leave one __syncwarp at different times: a write after it races with a read after it.
__global__ void write_after_syncwarp_kernel(float* out) {
  MMOE_SHARED(float, row, kWarp);
  row[threadIdx.x] = 1.0f;
  __syncwarp();
  const float next = row[(threadIdx.x + 1) % kWarp];
  row[threadIdx.x] = 2.0f;
  __syncwarp();
  out[threadIdx.x] = next;
}

__global__ void plain_add_kernel(float* total) {
  // A barrier orders the threads of a block, not the blocks.
  __syncthreads();
  if (threadIdx.x == 0) *total += 1.0f;
}

__global__ void static_overflow_kernel(float* out) {
  MMOE_SHARED(float, row, kThreads);
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x + 1];
}

__global__ void dynamic_overflow_kernel() {
  MMOE_DYNAMIC_SHARED(float, row);
  row[threadIdx.x + 1] = 0.0f;
}

__global__ void global_overflow_kernel(float* out) { out[threadIdx.x + 1] = 0.0f; }

__global__ void misaligned_kernel(const float* in, float* out) {
  out[threadIdx.x] = emulator::load<float4>(in + 4 * threadIdx.x + 1).x;
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < kWarp) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void deadlock_kernel() {
  if (threadIdx.x < 3) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void divergent_collective_kernel(float* out) {
  const float value = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(kAllLanes, value, 1) : __ballot_sync(kAllLanes, 1);
}

__global__ void shuffle_from_exited_kernel(float* out) {
  if (threadIdx.x == 0) return;
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1.0f, 0);
}

__global__ void outside_mask_kernel() { __syncwarp(0xffffu); }

__global__ void unset_shared_kernel(float* out) {
  MMOE_SHARED(float, row, kThreads);
  if (threadIdx.x != 5) row[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

__global__ void too_much_shared_kernel() {
  MMOE_SHARED(float, row, 12 * 1024);
  MMOE_DYNAMIC_SHARED(float, more);
  row[0] = more[0] = 0.0f;
}

__global__ void large_shared_kernel(float* out) {
  MMOE_DYNAMIC_SHARED(float, row);
  for (int i = threadIdx.x; i < 50 * 1024; i += kThreads) row[i] = 1.0f;
  out[threadIdx.x] = row[threadIdx.x];
}

double sum(const std::vector<float>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

// Launches a kernel of one float*, 64 elements of it, and sums them.
double run(void (*kernel)(float*), int blocks, int threads, int elements = kThreads) {
  std::vector<float> out(elements, 0.0f);
  MMOE_LAUNCH(kernel, blocks, threads, 0, nullptr)(out.data());
  return sum(out);
}

extern "C" {

double clean() {
  std::vector<float> in(3 * kThreads * 4, 1.0f), total(1, 0.0f);
  std::vector<int> arrivals(1, 0);
  MMOE_LAUNCH(clean_kernel, 3, kThreads, kThreads * sizeof(float), nullptr)
  (reinterpret_cast<const float4*>(in.data()), total.data(), arrivals.data());
  return total[0] + 1000.0 * arrivals[0] + run(reverse_kernel<true>, 2, kThreads, 2 * kThreads);
}
double missing_syncthreads() { return run(reverse_kernel<false>, 1, kThreads); }
double missing_syncwarp() { return run(missing_syncwarp_kernel, 1, kWarp); }
double write_after_syncwarp() { return run(write_after_syncwarp_kernel, 1, kWarp); }
double plain_add() { return run(plain_add_kernel, 3, kThreads); }
double static_overflow() { return run(static_overflow_kernel, 1, kThreads); }
double dynamic_overflow() {
  MMOE_LAUNCH(dynamic_overflow_kernel, 1, kThreads, kThreads * sizeof(float), nullptr)();
  return 0;
}
double global_overflow() { return run(global_overflow_kernel, 1, kThreads); }
double misaligned() {
  std::vector<float> in(4 * kThreads + 4, 1.0f), out(kThreads);
  MMOE_LAUNCH(misaligned_kernel, 1, kThreads, 0, nullptr)(in.data(), out.data());
  return sum(out);
}
double divergent_barrier() {
  MMOE_LAUNCH(divergent_barrier_kernel, 1, kThreads, 0, nullptr)();
  return 0;
}
double deadlock() {
  MMOE_LAUNCH(deadlock_kernel, dim3(2, 3), dim3(16, 2), 0, nullptr)();
  return 0;
}
double divergent_collective() { return run(divergent_collective_kernel, 1, kWarp); }
double shuffle_from_exited() { return run(shuffle_from_exited_kernel, 1, kWarp); }
double outside_mask() {
  MMOE_LAUNCH(outside_mask_kernel, 1, kWarp, 0, nullptr)();
  return 0;
}
double unset_shared() { return run(unset_shared_kernel, 1, kThreads); }
double too_much_shared() {
  MMOE_LAUNCH(too_much_shared_kernel, 1, kThreads, 1024, nullptr)();
  return 0;
}
double too_much_dynamic() {
  std::vector<float> out(kThreads);
  MMOE_LAUNCH(large_shared_kernel, 1, kThreads, 200 * 1024, nullptr)(out.data());
  return sum(out);
}
double allowed_dynamic() {
  cudaFuncSetAttribute(large_shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024);
  return too_much_dynamic();
}
double empty_grid() { return run(reverse_kernel<true>, 0, kThreads); }
double large_block() { return run(reverse_kernel<true>, 1, 1025); }
}

}  // namespace mmoe::planted
