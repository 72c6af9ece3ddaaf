// CUDA for g++: what *_kernel.cuh and *_cuda.cu need of the language and of the runtime, run on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include "emulator/intrinsics.h"
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static thread_local /* one OS thread runs one block at a time */
#define __launch_bounds__(...)
#define __grid_constant__
#ifndef __constant__
#define __constant__
#endif
#ifndef __global__
#define __global__
#define __device__
#define __host__
#endif
#define __forceinline__ inline __attribute__((always_inline))
// per-block allocation keyed by call site: ASan red zones, NaN poison, never shared between blocks
#define MMOE_SHARED(T, name, N) T* const name = reinterpret_cast<T*>(::emulator::shared_site([] {}, sizeof(T) * (N)))
#define MMOE_LAUNCH(kern, grid, block, smem, stream) \
  ::emulator::Launcher{dim3(grid), dim3(block), (size_t)(smem)}.bind([&](auto&&... a_) { kern(a_...); })
#define MMOE_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::emulator::ctx()->dynsmem)

namespace emulator {
struct Ctx {  // per CUDA thread, read by the kernel
  uint3 tid, bid;
  dim3 bdim, gdim;
  unsigned lane, warp;
  unsigned char* dynsmem;
};
extern thread_local Ctx* g_ctx;
// noinline + never cached: a fiber never migrates between OS threads, g_ctx is rewritten on each switch
inline Ctx* ctx() { return g_ctx; }
enum Op : int { OP_SYNCWARP = 1, OP_SHFL, OP_VOTE, OP_MATCH, OP_REDUX, OP_MMA, OP_LDMATRIX };
int barrier_count(bool vote);        // a barrier; the threads that voted
void barrier(int id, int nthreads);  // __syncthreads / named barrier
// deposits `n` bytes, waits for every live lane in mask, returns pointer to 32 slots of 64 bytes (valid until the
// lane's next op on mask)
const unsigned char* warp_exchange(unsigned mask, Op op, const void* payload, int n, bool mem_order, unsigned* present);
void slot_read(void* dst, const unsigned char* slots, int lane, int n);  // uninstrumented
void cp_async(void* dst, const void* src, int n);
void cp_commit();
void cp_wait(int n);
void* shared_alloc(const void* key, size_t bytes);
template <class L>
inline void* shared_site(L, size_t bytes) {
  static const char key = 0;
  return shared_alloc(&key, bytes);
}
[[noreturn]] void fail(const char* fmt, ...);
void launch(dim3 grid, dim3 block, size_t smem, const std::function<void()>& body);
template <class F>
struct Bound {
  dim3 g, b;
  size_t s;
  F f;
  template <class... A>
  void operator()(A... a) const {
    launch(g, b, s, [&] { f(a...); });
  }
};
struct Launcher {
  dim3 g, b;
  size_t s;
  template <class F>
  Bound<F> bind(F f) const {
    return {g, b, s, f};
  }
};
template <class T>
inline T shfl_impl(unsigned mask, T v, int src, bool valid) {
  static_assert(sizeof(T) <= 64);
  unsigned present;
  const unsigned char* s = warp_exchange(mask, OP_SHFL, &v, sizeof(T), false, &present);
  if (!valid) return v;
  if (!((present >> src) & 1)) fail("shfl reads lane %d that is not in the mask / has exited (mask %08x)", src, mask);
  T r;
  slot_read(&r, s, src, sizeof(T));
  return r;
}
}  // namespace emulator
#define threadIdx (::emulator::ctx()->tid)
#define blockIdx (::emulator::ctx()->bid)
#define blockDim (::emulator::ctx()->bdim)
#define gridDim (::emulator::ctx()->gdim)
static constexpr int warpSize = 32;
inline void __syncthreads() { ::emulator::barrier(0, 0); }
inline void __syncwarp(unsigned m = 0xffffffffu) {
  unsigned p;
  ::emulator::warp_exchange(m, ::emulator::OP_SYNCWARP, nullptr, 0, true, &p);
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { __threadfence(); }
inline int __syncthreads_count(int p) { return ::emulator::barrier_count(p != 0); }
inline int __syncthreads_or(int p) { return __syncthreads_count(p) != 0; }
inline int __syncthreads_and(int p) { return __syncthreads_count(p == 0) == 0; }
template <class T>
inline T __shfl_sync(unsigned m, T v, int src, int w = 32) {
  int l = ::emulator::ctx()->lane, base = l & ~(w - 1);
  return ::emulator::shfl_impl(m, v, base + (src & (w - 1)), true);
}
template <class T>
inline T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  int l = ::emulator::ctx()->lane, s = l ^ x;
  return ::emulator::shfl_impl(m, v, s & 31, (s & ~(w - 1)) <= (l & ~(w - 1)));
}
template <class T>
inline T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = ::emulator::ctx()->lane;
  int s = l + d;
  return ::emulator::shfl_impl(m, v, s & 31, (l & (w - 1)) + (int)d < w);
}
template <class T>
inline T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = ::emulator::ctx()->lane;
  int s = l - (int)d;
  return ::emulator::shfl_impl(m, v, s & 31, (l & (w - 1)) >= (int)d);
}
inline unsigned __ballot_sync(unsigned m, int p) {
  int v = p != 0;
  unsigned pr, r = 0;
  const unsigned char* s = ::emulator::warp_exchange(m, ::emulator::OP_VOTE, &v, 4, false, &pr);
  for (int i = 0; i < 32; i++)
    if ((pr >> i) & 1) {
      int x;
      ::emulator::slot_read(&x, s, i, 4);
      r |= unsigned(x) << i;
    }
  return r;
}
template <class T>
inline unsigned __match_any_sync(unsigned m, T value) {
  unsigned pr, r = 0;
  const unsigned char* s = ::emulator::warp_exchange(m, ::emulator::OP_MATCH, &value, sizeof(T), false, &pr);
  for (int i = 0; i < 32; i++)
    if ((pr >> i) & 1) {
      T x;
      ::emulator::slot_read(&x, s, i, sizeof(T));
      r |= unsigned(x == value) << i;
    }
  return r;
}
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return (__ballot_sync(m, !p)) == 0; }
namespace emulator {
template <class T, class F>
inline T reduce_impl(unsigned m, T v, F f) {
  unsigned pr;
  const unsigned char* s = warp_exchange(m, OP_REDUX, &v, sizeof(T), false, &pr);
  T r{};
  bool first = true;
  for (int i = 0; i < 32; i++)
    if ((pr >> i) & 1) {
      T x;
      slot_read(&x, s, i, sizeof(T));
      r = first ? x : f(r, x);
      first = false;
    }
  return r;
}
}  // namespace emulator
#define MMOE_REDUCE(name, type, expression)                                                  \
  inline type name(unsigned m, type v) {                                                     \
    return ::emulator::reduce_impl(m, v, [](type a, type b) -> type { return expression; }); \
  }
MMOE_REDUCE(__reduce_add_sync, unsigned, a + b)
MMOE_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
MMOE_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
MMOE_REDUCE(__reduce_min_sync, int, a < b ? a : b)
MMOE_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
MMOE_REDUCE(__reduce_max_sync, int, a > b ? a : b)
MMOE_REDUCE(__reduce_and_sync, unsigned, a& b)
MMOE_REDUCE(__reduce_or_sync, unsigned, a | b)
MMOE_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef MMOE_REDUCE
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
inline void __stcg(T* p, std::type_identity_t<T> v) {
  *p = v;
}
inline void __nanosleep(unsigned) {}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <class T, class F>
inline T atomic_update(T* p, F f) {
  std::atomic_ref<T> a(*p);
  T o = a.load(std::memory_order_relaxed);
  while (!a.compare_exchange_weak(o, f(o), std::memory_order_relaxed)) {
  }
  return o;
}
template <class T>
inline T atomicAdd(T* p, std::type_identity_t<T> v) {
  return atomic_update(p, [v](T o) { return static_cast<T>(o + v); });
}
template <class T>
inline T atomicSub(T* p, std::type_identity_t<T> v) {
  return atomic_update(p, [v](T o) { return static_cast<T>(o - v); });
}
template <class T>
inline T atomicMax(T* p, std::type_identity_t<T> v) {
  return atomic_update(p, [v](T o) { return o < v ? v : o; });
}
template <class T>
inline T atomicMin(T* p, std::type_identity_t<T> v) {
  return atomic_update(p, [v](T o) { return v < o ? v : o; });
}
template <class T>
inline T atomicAnd(T* p, std::type_identity_t<T> v) {
  return atomic_update(p, [v](T o) { return o & v; });
}
template <class T>
inline T atomicOr(T* p, std::type_identity_t<T> v) {
  return atomic_update(p, [v](T o) { return o | v; });
}
template <class T>
inline T atomicXor(T* p, std::type_identity_t<T> v) {
  return atomic_update(p, [v](T o) { return o ^ v; });
}
template <class T>
inline T atomicExch(T* p, std::type_identity_t<T> v) {
  return std::atomic_ref<T>(*p).exchange(v, std::memory_order_relaxed);
}
template <class T>
inline T atomicCAS(T* p, std::type_identity_t<T> c, std::type_identity_t<T> v) {
  std::atomic_ref<T>(*p).compare_exchange_strong(c, v, std::memory_order_relaxed);
  return c;
}
namespace cc {
struct MmaIn {
  uint32_t a[4], b[2];
};
inline float bf(uint32_t r, int hi) {
  uint32_t u = hi ? (r & 0xffff0000u) : (r << 16);
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// PTX ISA m16n8k16 fragment layout: g=lane>>2, t=lane&3. A reg0:(g,2t..) reg1:(g+8,2t..) reg2:(g,2t+8..)
// reg3:(g+8,2t+8..) B reg0: k=2t.. n=g, reg1: k=2t+8.. n=g.  C/D 0,1: (g,2t..) 2,3: (g+8,2t..)
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  MmaIn in;
  std::memcpy(in.a, a, 16);
  std::memcpy(in.b, b, 8);
  unsigned pr;
  const unsigned char* s = ::emulator::warp_exchange(0xffffffffu, ::emulator::OP_MMA, &in, sizeof(in), false, &pr);
  if (pr != 0xffffffffu) ::emulator::fail("mma.sync executed with lanes missing (%08x)", pr);
  MmaIn all[32];
  for (int l = 0; l < 32; l++) ::emulator::slot_read(&all[l], s, l, sizeof(MmaIn));
  auto at = [&](int l) { return &all[l]; };
  int lane = ::emulator::ctx()->lane, g = lane >> 2, t = lane & 3;
  for (int i = 0; i < 4; i++) {
    int row = g + 8 * (i >> 1), col = 2 * t + (i & 1);
    float acc = c[i];
    for (int k = 0; k < 16; k++) {
      int tt = (k & 7) >> 1, hi = k & 1;
      float av = bf(at((row & 7) * 4 + tt)->a[(row >> 3) + 2 * (k >> 3)], hi);
      float bv = bf(at(col * 4 + tt)->b[k >> 3], hi);
      acc += av * bv;
    }
    d[i] = acc;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
  unsigned pr;
  if ((uintptr_t)smem & 15) ::emulator::fail("ldmatrix row address not 16-byte aligned");
  const unsigned char* s = ::emulator::warp_exchange(0xffffffffu, ::emulator::OP_LDMATRIX, &smem, 8, false, &pr);
  int lane = ::emulator::ctx()->lane;
  for (int i = 0; i < 4; i++) {
    const char* row;
    ::emulator::slot_read(&row, s, 8 * i + (lane >> 2), 8);
    r[i] = *reinterpret_cast<const uint32_t*>(row + 4 * (lane & 3));
  }
}
inline void cp_async16(void* s, const void* g) { ::emulator::cp_async(s, g, 16); }
inline void cp_async_commit() { ::emulator::cp_commit(); }
template <int N>
inline void cp_async_wait() {
  ::emulator::cp_wait(N);
}
}  // namespace cc

namespace emulator {
int multiprocessors();
template <class V>
inline V load(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) fail("misaligned %zu-byte vector load at %p", sizeof(V), p);
  return *static_cast<const V*>(p);
}
template <class V>
inline void store(void* p, V v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) fail("misaligned %zu-byte vector store at %p", sizeof(V), p);
  *static_cast<V*>(p) = v;
}
}  // namespace emulator
