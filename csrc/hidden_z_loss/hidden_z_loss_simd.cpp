#include "hidden_z_loss/hidden_z_loss_simd.h"

#include "common/simd.h"

namespace mmoe::MMOE_SIMD {
namespace {

// A row is read twice, from memory once: 24 KB at most stay in the first-level cache between the maximum and the sum.
template <typename T, typename C>
void forward(const T* z, const bool* valid, C* lse, int64_t width, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t body = width - width % lanes;
  for (int64_t token = begin; token < end; ++token) {
    if (valid != nullptr && !valid[token]) {
      lse[token] = 0;
      continue;
    }
    const T* row = z + token * width;
    Vec<C> largest{};
    for (int64_t i = 0; i < body; i += lanes) largest = max(largest, abs(load(row + i)));
    if (body < width) largest = max(largest, abs(load_first(row + body, width - body, C(0))));
    const C top = max_of(largest);
    Vec<C> total{};
    for (int64_t i = 0; i < body; i += lanes) total += exp(abs(load(row + i)) - top);
    if (body < width) {
      const Vec<C> rest = exp(abs(load_first(row + body, width - body, C(0))) - top);
      total += index_below<C>(width - body) ? rest : Vec<C>{};
    }
    lse[token] = top + std::log(sum(total));
  }
}

template <typename T, typename C>
void backward(const T* z, const C* lse, C factor, T* grad_z, int64_t width, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t body = width - width % lanes;
  for (int64_t token = begin; token < end; ++token) {
    const T* row = z + token * width;
    T* grad = grad_z + token * width;
    if (lse[token] == 0) {
      std::memset(static_cast<void*>(grad), 0, width * sizeof(T));
      continue;
    }
    const C scale = factor * lse[token];
    const auto slope = [&](Vec<C> values) {
      const Vec<C> size = exp(abs(values) - lse[token]) * scale;
      return values < 0 ? -size : values == 0 ? Vec<C>{} : size;
    };
    for (int64_t i = 0; i < body; i += lanes) store(grad + i, slope(load(row + i)));
    if (body < width) {
      store_first(grad + body, slope(load_first(row + body, width - body, C(0))), width - body);
    }
  }
}

template <typename T, typename C>
constexpr HiddenZLossOf<T, C> of{forward<T, C>, backward<T, C>};

}  // namespace

const HiddenZLossKernels hidden_z_loss_kernels{of<float, float>, of<BFloat16, float>, of<double, double>};

}  // namespace mmoe::MMOE_SIMD
