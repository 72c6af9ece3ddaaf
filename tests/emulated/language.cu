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
  put(5, __shfl_down_sync(kAllLanes, value, 3, 8));
  put(6, static_cast<int>(__ballot_sync(kAllLanes, value % 2)));
  put(7, static_cast<int>(__match_any_sync(kAllLanes, value % 3)));
  put(8, __reduce_add_sync(kAllLanes, value));
  put(9, __reduce_max_sync(half, value));
  put(10, __reduce_min_sync(half, value));
  // Two halves of a warp in collectives of their own, while one waits for the other.
  int sum = value;
  if (lane < 16) sum += __shfl_xor_sync(half, value, 1);
  __syncwarp();
  put(11, sum);
  put(12, __any_sync(kAllLanes, value == 40) + 2 * __all_sync(kAllLanes, value >= 0));
  put(13, __shfl_xor_sync(kAllLanes, static_cast<long long>(value) << 32, 1) >> 32);
  put(14, static_cast<int>(__shfl_xor_sync(kAllLanes, static_cast<double>(value), 1)));
  put(15, static_cast<int>(__bfloat162float(__shfl_xor_sync(kAllLanes, __float2bfloat16(value), 1))));
}

// Every second thread exits first: votes and barriers are of those that are left.
__global__ void votes_kernel(int* out) {
  if (threadIdx.x % 2) return;
  const int count = __syncthreads_count(threadIdx.x < 10);
  const int any = __syncthreads_or(threadIdx.x == 1), all = __syncthreads_and(threadIdx.x % 2 == 0);
  out[threadIdx.x] = count + 100 * any + 1000 * all;
}

}  // namespace mmoe::language

extern "C" {

void collectives(const int* in, int* out) {
  MMOE_LAUNCH(mmoe::language::collectives_kernel, 1, mmoe::kWarp, 0, nullptr)(in, out);
}
void votes(int* out) { MMOE_LAUNCH(mmoe::language::votes_kernel, 1, 2 * mmoe::kWarp, 0, nullptr)(out); }
float largest(float a, float b) { return max(a, b); }
int to_int(float value) { return __float2int_rn(value); }
unsigned reversed(unsigned bits) { return __brev(bits); }
}
