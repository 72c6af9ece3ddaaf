#include "unpermute/unpermute_simd.h"

#include "common/stream.h"

namespace mmoe::MMOE_SIMD {
namespace {

// Sums kCount vectors at a time over all slots: a token's rows are read side by side, each once.
template <typename T, typename C>
void forward(const T* rows, const int32_t* row_of_slot, const C* weights, const T* x, const C* identity, T* out,
             int64_t top_k, int64_t width, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>, block = 4 * lanes;
  for (int64_t token = begin; token < end; ++token) {
    const int32_t* row = row_of_slot + token * top_k;
    const auto weight = [&](int64_t j) { return weights == nullptr ? C(1) : weights[token * top_k + j]; };
    const auto sum_of = [&](auto& totals, auto&& load_at) {
      for (int64_t j = 0; j < top_k; ++j) {
        if (row[j] < 0) continue;
        const C factor = weight(j);
        for (int i = 0; i < static_cast<int>(std::size(totals)); ++i) {
          totals[i] += factor * load_at(rows + row[j] * width, i);
        }
      }
      if (x == nullptr) return;
      for (int i = 0; i < static_cast<int>(std::size(totals)); ++i) {
        totals[i] += identity[token] * load_at(x + token * width, i);
      }
    };
    int64_t column = 0;
    for (; column + block <= width; column += block) {
      Vec<C> totals[4]{};
      sum_of(totals, [&](const T* from, int64_t i) { return load(from + column + i * lanes); });
      for (int64_t i = 0; i < 4; ++i) store(out + token * width + column + i * lanes, totals[i]);
    }
    for (; column < width; column += lanes) {
      const int64_t count = std::min(lanes, width - column);
      Vec<C> total[1]{};
      sum_of(total, [&](const T* from, int64_t) {
        return count == lanes ? load(from + column) : load_first(from + column, count, C(0));
      });
      if (count == lanes) {
        store(out + token * width + column, total[0]);
      } else {
        store_first(out + token * width + column, total[0], count);
      }
    }
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
