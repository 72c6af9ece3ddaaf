#include "unpermute/unpermute_simd.h"

#include "common/stream.h"

namespace mmoe::MMOE_SIMD {
namespace {

// A token's rows are read side by side, so many columns at a time that their sums stay in registers.
constexpr int kColumns = 8;
// The hardware follows so many short runs too late for bf16.
constexpr int64_t kPrefetchBytes = 1024;

// totals[i] += factor * from[i], vectors.
template <typename T, typename C, size_t kCount>
MMOE_INLINE void add_scaled(Vec<C> (&totals)[kCount], C factor, const T* from) {
  for (size_t i = 0; i < kCount; ++i) totals[i] += factor * load(from + i * kLanes<T>);
}

template <typename T, typename C>
void forward(const T* rows, const int32_t* row_of_slot, const C* weights, const T* x, const C* identity, T* out,
             int64_t top_k, int64_t width, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>, block = kColumns * lanes;
  for (int64_t token = begin; token < end; ++token) {
    const int32_t* row_of = row_of_slot + token * top_k;
    // Calls add(factor, row) for every term of the sum, in order.
    const auto for_each_term = [&](auto&& add) {
      for (int64_t j = 0; j < top_k; ++j) {
        if (row_of[j] >= 0) add(weights == nullptr ? C(1) : weights[token * top_k + j], rows + row_of[j] * width);
      }
      if (x != nullptr) add(identity[token], x + token * width);
    };
    T* to = out + token * width;
    int64_t column = 0;
    for (; column + block <= width; column += block) {
      Vec<C> totals[kColumns]{};
      for_each_term([&](C factor, const T* row) {
        const char* ahead = reinterpret_cast<const char*>(row + column) + kPrefetchBytes;
        for (int64_t i = 0; i < block * static_cast<int64_t>(sizeof(T)); i += kLineBytes) __builtin_prefetch(ahead + i);
        add_scaled(totals, factor, row + column);
      });
      for (int64_t i = 0; i < kColumns; ++i) store(to + column + i * lanes, totals[i]);
    }
    for (; column + lanes <= width; column += lanes) {
      Vec<C> total[1]{};
      for_each_term([&](C factor, const T* row) { add_scaled(total, factor, row + column); });
      store(to + column, total[0]);
    }
    if (column == width) continue;
    Vec<C> total{};
    for_each_term([&](C factor, const T* row) { total += factor * load_first(row + column, width - column, C(0)); });
    store_first(to + column, total, width - column);
  }
}

// scaled = factor * grad, and the dot product of grad and values.
template <bool kStream, typename T, typename C>
MMOE_INLINE C scale_and_dot(const T* grad, const T* values, C factor, T* scaled, int64_t width) {
  constexpr int64_t lanes = kLanes<T>, vectors = kVectorsPerLine<T>;
  Vec<C> totals[vectors]{};
  int64_t column = 0;
  for (; column + kPerLine<T> <= width; column += kPerLine<T>) {
    Vec<C> products[vectors];
    for (int64_t i = 0; i < vectors; ++i) {
      const Vec<C> g = load(grad + column + i * lanes);
      totals[i] += g * load(values + column + i * lanes);
      products[i] = factor * g;
    }
    store_line_of<kStream>(scaled + column, products);
  }
  for (; column < width; column += lanes) {
    const int64_t count = std::min(lanes, width - column);
    const Vec<C> g = load_first(grad + column, count, C(0));
    totals[0] += g * load_first(values + column, count, C(0));
    store_first(scaled + column, factor * g, count);
  }
  for (int64_t i = 1; i < vectors; ++i) totals[0] += totals[i];
  return sum(totals[0]);
}

// By token: its gradient stays in the first or second level cache while its rows and x stream past it.
template <typename T, typename C>
void backward(const T* grad_out, const T* rows, const int32_t* row_of_slot, const C* weights, const T* x,
              const C* identity, T* grad_rows, C* grad_weights, T* grad_x, C* grad_identity, int64_t top_k,
              int64_t width, bool stream, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const T* grad = grad_out + token * width;
    grad_identity[token] =
        scale_and_dot<false>(grad, x + token * width, identity[token], grad_x + token * width, width);
    for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
      const int64_t row = row_of_slot[slot];
      if (row < 0) {
        grad_weights[slot] = 0;
        continue;
      }
      const auto pass = stream ? scale_and_dot<true, T, C> : scale_and_dot<false, T, C>;
      grad_weights[slot] = pass(grad, rows + row * width, weights[slot], grad_rows + row * width, width);
    }
  }
  if (stream) end_stream();
}

template <typename T, typename C>
constexpr UnpermuteOf<T, C> of{forward<T, C>, backward<T, C>};

}  // namespace

const UnpermuteKernels unpermute_kernels{of<float, float>, of<BFloat16, float>, of<double, double>};

}  // namespace mmoe::MMOE_SIMD
