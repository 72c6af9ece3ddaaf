// Kernels whose memory traffic is known: what tests/emulated/test_counters.py counts. One warp a block throughout.
#include <vector>

#include "common/vector.cuh"

namespace mmoe::traffic {

constexpr int kBlocks = 3;

__global__ void vector_copy(const float* in, float* out) {
  const int i = 4 * (blockIdx.x * kWarp + threadIdx.x);
  store16(out + i, load16(in + i));
}

__global__ void struct_copy(const float* in, float* out) {
  const int i = blockIdx.x * kWarp + threadIdx.x;
  reinterpret_cast<float4*>(out)[i] = reinterpret_cast<const float4*>(in)[i];
}

// Two loads by one inlined function, one after the other.
__global__ void two_vectors(const float* in, float* out) {
  float low[4], high[4];
  load_vector(in + 8 * threadIdx.x, low);
  load_vector(in + 8 * threadIdx.x + 4, high);
  out[threadIdx.x] = low[0] + high[0];
}

__global__ void stride_two(const float* in, float* out) {
  const int i = blockIdx.x * kWarp + threadIdx.x;
  out[i] = in[2 * i];
}

__global__ void shifted(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

__global__ void one_word(const float* in, float* out) {
  const float value = *in;
  if (threadIdx.x < 3) out[threadIdx.x] = value;
}

// Each of the lanes goes round the loop once more than the one before.
__global__ void ragged_loop(const float* in, float* out) {
  float sum = 0.0f;
  for (unsigned i = 0; i <= threadIdx.x; ++i) sum += in[i * kWarp + threadIdx.x];
  if (sum < 0.0f) *out = sum;
}

template <int kStride>
__global__ void shared_stride(const float*, float* out) {
  MMOE_SHARED(float, row, kStride* kWarp);
  row[kStride * threadIdx.x] = 1.0f;
  __syncwarp();
  if (row[kStride * threadIdx.x] < 0.0f) *out = 0.0f;
}

__global__ void shared_broadcast(const float*, float* out) {
  MMOE_SHARED(float, row, kWarp);
  row[threadIdx.x] = 1.0f;
  __syncthreads();
  if (row[7] < 0.0f) *out = 0.0f;
}

template <int kRow>
__global__ void transpose(const float* in, float* out) {
  MMOE_SHARED(float, tile, kWarp* kRow);
  for (int i = 0; i < kWarp; ++i) tile[i * kRow + threadIdx.x] = in[i * kWarp + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < kWarp; ++i) out[i * kWarp + threadIdx.x] = tile[threadIdx.x * kRow + i];
}

template <typename V, int kStride>
__global__ void shared_vectors(const float*, float* out) {
  MMOE_SHARED(V, row, kStride * kWarp);
  if (emulator::load<V>(row + kStride * threadIdx.x).x == 0.0f) *out = 0.0f;
}

__global__ void atomics(const float*, float* out) {
  MMOE_SHARED(int, arrivals, 1);
  if (threadIdx.x == 0) *arrivals = 0;
  __syncthreads();
  atomicAdd(arrivals, 1);
  if (threadIdx.x < 2) atomicAdd(out, 1.0f);
  __syncthreads();
}

}  // namespace mmoe::traffic

extern "C" void run() {
  using namespace mmoe::traffic;
  std::vector<float> in(8 * kBlocks * mmoe::kWarp * mmoe::kWarp), out(in.size());
  // Vectors of the C++ heap are aligned to 16 bytes; a sector is 32, and a GPU allocates by 256.
  const auto align = [](std::vector<float>& values) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(values.data()) + 255) / 256 * 256);
  };
  const auto launch = [&](void (*kernel)(const float*, float*)) {
    MMOE_LAUNCH(kernel, kBlocks, mmoe::kWarp, 0, nullptr)(align(in), align(out));
  };
  for (auto* kernel :
       {vector_copy, struct_copy, two_vectors, stride_two, shifted, one_word, ragged_loop, shared_stride<1>,
        shared_stride<2>, shared_stride<32>, shared_broadcast, transpose<32>, transpose<33>, shared_vectors<float2, 1>,
        shared_vectors<float2, 2>, shared_vectors<float4, 1>, shared_vectors<float4, 2>, atomics}) {
    launch(kernel);
  }
}
