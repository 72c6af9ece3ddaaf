#include <cstdlib>
#include <string_view>

#include "common/checks.h"
#include "common/simd_dispatch.h"

namespace mmoe {
namespace {

Simd best() {
#ifdef __x86_64__
  if (!__builtin_cpu_supports("x86-64-v3")) return Simd::generic;
  if (!__builtin_cpu_supports("x86-64-v4")) return Simd::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Simd::avx512_bf16 : Simd::avx512;
#else
  return Simd::generic;
#endif
}

Simd chosen() {
  constexpr std::string_view names[] = {"generic", "avx2", "avx512", "avx512_bf16"};
  const char* wanted = std::getenv("MMOE_SIMD");
  if (wanted == nullptr || *wanted == '\0') return best();
  for (int i = 0; i < 4; ++i) {
    if (names[i] == wanted) return static_cast<Simd>(i) < best() ? static_cast<Simd>(i) : best();
  }
  check(false, "MMOE_SIMD=", wanted, ": must be generic, avx2, avx512 or avx512_bf16");
  return best();
}

}  // namespace

Simd simd() {
  static const Simd level = chosen();
  return level;
}

}  // namespace mmoe
