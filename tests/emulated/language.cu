// Collectives and intrinsics whose answer is known, a row of 32 lanes each: what tests/emulated/test_language.py reads.
#include "common/device.cuh"

namespace mmoe::language {

__global__ void collectives_kernel(const int* in, int* out) {
  const int lane = threadIdx.x, value = in[lane];
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const auto put = [&](int row, int result) { out[row * kWarp + lane] = result; };
  put(0, __shfl_sync(kAllLanes, value, lane + 1));
  put(1, __shfl_sync(kAllLanes, value, 5, 8));
  put(2, __shfl_xor_sync(kAllLanes, value, 3));
  put(3, __shfl_xor_sync(kAllLanes, value, 16, 16));
  put(4, __shfl_up_sync(kAllLanes, value, 2));
  put(5, __shfl_up_sync(kAllLanes, value, 3, 8));
  put(6, static_cast<int>(__ballot_sync(kAllLanes, value % 2)));
  put(7, static_cast<int>(__match_any_sync(kAllLanes, value % 3)));
  put(8, static_cast<int>(__ballot_sync(half, value % 2)));
  // Two halves of a warp in collectives of their own, while one waits for the other.
  int sum = value;
  if (lane < 16) sum += __shfl_xor_sync(half, value, 1);
  __syncwarp();
  put(9, sum);
  put(10, __shfl_xor_sync(kAllLanes, static_cast<long long>(value) << 32, 1) >> 32);
  put(11, static_cast<int>(__shfl_xor_sync(kAllLanes, static_cast<double>(value), 1)));
  put(12, static_cast<int>(__bfloat162float(__shfl_xor_sync(kAllLanes, __float2bfloat16(value), 1))));
}

// Every second thread exits first: barriers and votes are of those that are left.
__global__ void left_kernel(unsigned* out) {
  MMOE_SHARED(int, row, 2 * kWarp);
  if (threadIdx.x % 2) return;
  row[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = __ballot_sync(kAllLanes, row[threadIdx.x ^ kWarp] < 10);
}

}  // namespace mmoe::language

extern "C" {

void collectives(const int* in, int* out) {
  MMOE_LAUNCH(mmoe::language::collectives_kernel, 1, mmoe::kWarp, 0, nullptr)(in, out);
}
void left(unsigned* out) { MMOE_LAUNCH(mmoe::language::left_kernel, 1, 2 * mmoe::kWarp, 0, nullptr)(out); }
float largest(float a, float b) { return max(a, b); }
float divided(float a, float b) { return __fdividef(a, b); }
}
