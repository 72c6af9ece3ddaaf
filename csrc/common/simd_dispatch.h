// Which instruction set the CPU kernels use on this machine, chosen once at run time: one library for all of them.
//
// A *_simd.cpp defines `const Kernels kernels` (a struct of function pointers) in its own namespace inside
// mmoe::MMOE_SIMD; MMOE_DECLARE_SIMD(Kernels, kernels) gives its host code `const Kernels& kernels()`.
#pragma once

namespace mmoe {

enum class Simd { generic, avx2, avx512, avx512_bf16 };

// The best that the machine has, or what MMOE_SIMD names (generic, avx2, avx512, avx512_bf16) where that is less.
Simd simd();

}  // namespace mmoe

#ifdef __x86_64__
#define MMOE_DECLARE_SIMD(Kernels, kernels) \
  namespace generic {                       \
  extern const Kernels kernels;             \
  }                                         \
  namespace avx2 {                          \
  extern const Kernels kernels;             \
  }                                         \
  namespace avx512 {                        \
  extern const Kernels kernels;             \
  }                                         \
  namespace avx512_bf16 {                   \
  extern const Kernels kernels;             \
  }                                         \
  inline const Kernels& kernels() {         \
    switch (simd()) {                       \
      case Simd::avx2:                      \
        return avx2::kernels;               \
      case Simd::avx512:                    \
        return avx512::kernels;             \
      case Simd::avx512_bf16:               \
        return avx512_bf16::kernels;        \
      default:                              \
        return generic::kernels;            \
    }                                       \
  }
#else
#define MMOE_DECLARE_SIMD(Kernels, kernels) \
  namespace generic {                       \
  extern const Kernels kernels;             \
  }                                         \
  inline const Kernels& kernels() { return generic::kernels; }
#endif
