// The backward of sva on the CPU. a comes from the scores and lse, the gradient of a score from the window itself:
// ds = a * (da - sum over the keys of a * da). For an absorbed encoder the LayerNorm's two means need no pass of their
// own: with dx^ = sum over the heads of ds * absorbed + a * grad_pooled, the mean of dx^ follows from the sums of the
// rows of absorbed and grad_pooled, the mean of dx^ * x^ from the products that gave the scores.
#include "common/stream.h"
#include "sva/sva_simd_parts.h"

namespace mmoe::MMOE_SIMD {
namespace {

// scores -> a and slopes -> ds, over the rows of `keys` keys.
template <typename C>
void slope(C* scores, C* slopes, const C* lse, int64_t keys, int64_t heads, int64_t pitch) {
  constexpr int64_t lanes = kLanes<C>;
  for (int64_t head = 0; head < heads; head += lanes) {
    const Vec<C> shift = head + lanes <= heads ? load(lse + head) : load_first(lse + head, heads - head, C(0));
    Vec<C> total{};
    for (int64_t k = 0; k < keys; ++k) {
      const Vec<C> a = exp(load(scores + k * pitch + head) - shift);
      store(scores + k * pitch + head, a);
      total += a * load(slopes + k * pitch + head);
    }
    for (int64_t k = 0; k < keys; ++k) {
      C* to = slopes + k * pitch + head;
      store(to, load(scores + k * pitch + head) * (load(to) - total));
    }
  }
}

// The gradients of one key and value, and what the key adds to that of q.
template <bool kStream, typename T, typename C>
void grad_projected(const Space<C>& space, const C* a, const C* ds, const T* key, int64_t heads, int64_t width,
                    T* grad_key, T* grad_value) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t head = 0; head < heads; ++head) {
    const C *q = space.q + head * space.row, *grad = space.grad_out + head * space.row;
    C* grad_q = space.out + head * space.row;
    const T* from = key + head * width;
    T *to_key = grad_key + head * width, *to_value = grad_value + head * width;
    const auto add_to_q = [&](int64_t i) __attribute__((always_inline)) {
      store(grad_q + i, load(grad_q + i) + ds[head] * load(from + i));
    };
    int64_t i = 0;
    for (; i + kPerLine<T> <= width; i += kPerLine<T>) {
      Vec<C> of_key[kVectorsPerLine<T>], of_value[kVectorsPerLine<T>];
      for (int v = 0; v < kVectorsPerLine<T>; ++v) {
        of_key[v] = ds[head] * load(q + i + v * lanes);
        of_value[v] = a[head] * load(grad + i + v * lanes);
        add_to_q(i + v * lanes);
      }
      store_line_of<kStream>(to_key + i, of_key);
      store_line_of<kStream>(to_value + i, of_value);
    }
    for (; i + lanes <= width; i += lanes) {
      store(to_key + i, ds[head] * load(q + i));
      store(to_value + i, a[head] * load(grad + i));
      add_to_q(i);
    }
    if (i == width) continue;
    store_first(to_key + i, ds[head] * load(q + i), width - i);
    store_first(to_value + i, a[head] * load(grad + i), width - i);
    store(grad_q + i, load(grad_q + i) + ds[head] * load_first(from + i, width - i, C(0)));
  }
}

template <typename C>
void sum_rows(const C* rows, int64_t stride, int64_t heads, int64_t padded, C* to) {
  for (int64_t h = 0; h < heads; ++h) {
    Vec<C> total{};
    for (int64_t i = 0; i < padded; i += kLanes<C>) total += load(rows + h * stride + i);
    to[h] = sum(total);
  }
}

// sum over the heads of x * y + z * w.
template <typename C>
C dot_twice(const C* x, const C* y, const C* z, const C* w, int64_t heads) {
  C total = 0;
  for (int64_t h = 0; h < heads; ++h) total += x[h] * y[h] + z[h] * w[h];
  return total;
}

// The gradients of an absorbed encoder; ds already holds the factor 1 / sqrt(D).
template <typename T, typename C>
void grad_absorbed(const SvaArguments<T, C>& args, const SvaAbsorbed<T, C>& to, const Space<C>& all,
                   const AbsorbedSpace<C>& space, const Place& place, int64_t query, const Window& window,
                   int64_t first_key) {
  const int64_t heads = args.heads, channels = to.channels, keys = window.taking_part, pitch = all.pitch;
  const C *a = all.scores + first_key * pitch, *ds = all.slopes + first_key * pitch;
  C mean[kSvaWindow * kSvaWindow], slant[kSvaWindow * kSvaWindow];  // of dx^, and of dx^ * x^
  for (int64_t k = 0; k < keys; ++k) {
    const int64_t row = k * pitch, product = (first_key + k) * pitch;
    mean[k] = dot_twice(ds + row, space.sums, a + row, space.sums + pitch, heads) / channels;
    slant[k] = dot_twice(ds + row, all.products + product, a + row, all.grad_products + product, heads) / channels;
  }
  T* image = to.grad_features + place.image * window.all * args.rows * args.columns * channels;
  for_blocks<C>(channels, [&](auto vectors, int64_t first) __attribute__((always_inline)) {
    constexpr int kVectors = vectors();
    const int64_t head_step = args.queries * channels;
    pool<kVectors>(ds, pitch, space, keys, heads, first, channels, to.grad_absorbed + query * channels, head_step);
    pool<kVectors>(a, pitch, space, keys, heads, first, channels, to.pooled + query * channels, head_step);
    for_tiles<kTileRows>(keys, [&](auto tile, int64_t key) __attribute__((always_inline)) {
      constexpr int count = tile();
      Vec<C> sums[count][kVectors]{};
      accumulate(sums, ds + key * pitch, pitch, 1, space.absorbed + first, space.stride, heads);
      if (to.grad_pooled != nullptr) {
        accumulate(sums, a + key * pitch, pitch, 1, space.grad_pooled + first, space.stride, heads);
      }
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) {
        const int64_t k = key + i;
        const C* normed = space.normed + k * space.stride + first;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[i][v] = (sums[i][v] - mean[k] - load(normed + v * kLanes<C>) * slant[k]) * space.inverse[k];
        }
        store_block(image + window.cell[k] * channels, first, channels, sums[i]);
      }
    });
  });
  for (int64_t k = keys; k < window.all; ++k) {
    std::memset(static_cast<void*>(image + window.cell[k] * channels), 0, channels * sizeof(T));
  }
}

}  // namespace

template <typename T, typename C>
void backward(const SvaArguments<T, C>& args, C* memory, int64_t begin, int64_t end) {
  const Space<C> space = space_in(memory, args);
  const int64_t heads = args.heads, width = args.width, pitch = space.pitch, row_size = heads * width;
  const C scale = 1 / std::sqrt(static_cast<C>(width));
  std::memset(static_cast<void*>(memory), 0, space.elements * sizeof(C));
  Window windows[kSvaEncoders];
  for (int64_t query = begin; query < end; ++query) {
    const Place place = place_of(args, query);
    widen_row(args.q + query * row_size, heads, width, scale, space.q, space.row);
    if (args.grad_out != nullptr) {
      widen_row(args.grad_out + query * row_size, heads, width, C(1), space.grad_out, space.row);
    }
    int64_t keys = 0;
    for (int64_t i = 0; i < args.projected_count; ++i) {
      const SvaProjected<T>& from = args.projected[i];
      find_window(args, place, from.mask, from.window, windows[i]);
      const T* key_image = from.keys + place.image * from.keys_image;
      const T* value_image = from.values + place.image * from.values_image;
      for (int64_t k = 0; k < windows[i].taking_part; ++k, ++keys) {
        const int64_t cell = windows[i].cell[k] * row_size, next = cell_after(windows[i], k) * row_size;
        head_products(space.q, key_image + cell, heads, width, space.row, space.scores + keys * pitch,
                      key_image + next);
        head_products(space.grad_out, value_image + cell, heads, width, space.row, space.slopes + keys * pitch,
                      value_image + next);
      }
    }
    for (int64_t j = 0; j < args.absorbed_count; ++j) {
      const SvaAbsorbed<T, C>& from = args.absorbed[j];
      const AbsorbedSpace<C>& part = space.absorbed[j];
      Window& window = windows[args.projected_count + j];
      find_window(args, place, from.mask, from.window, window);
      score_absorbed(args, from, part, place, query, window, space.products + keys * pitch, pitch);
      const int64_t channels = from.channels, padded = round_up(channels, 16);
      sum_rows(part.absorbed, part.stride, heads, padded, part.sums);
      if (from.grad_pooled != nullptr) {
        widen_heads(from.grad_pooled + query * channels, args.queries * channels, heads, channels, part.grad_pooled,
                    part.stride);
        sum_rows(part.grad_pooled, part.stride, heads, padded, part.sums + pitch);
        products(part.grad_pooled, part.normed, part.stride, heads, window.taking_part, padded,
                 space.grad_products + keys * pitch, pitch);
      } else {
        std::memset(static_cast<void*>(space.grad_products + keys * pitch), 0, window.taking_part * pitch * sizeof(C));
      }
      for (int64_t k = 0; k < window.taking_part; ++k, ++keys) {
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t at = keys * pitch + h, number = h * args.queries + query;
          space.scores[at] = (space.products[at] + from.constants[number]) * scale;
          space.slopes[at] = space.grad_products[at] + (from.grad_mass == nullptr ? C(0) : from.grad_mass[number]);
        }
      }
    }
    slope(space.scores, space.slopes, args.lse + query * heads, keys, heads, pitch);

    std::memset(static_cast<void*>(space.out), 0, heads * space.row * sizeof(C));
    int64_t key = 0;
    for (int64_t i = 0; i < args.projected_count; ++i) {
      const SvaProjected<T>& to = args.projected[i];
      const Window& window = windows[i];
      const T* keys_image = to.keys + place.image * to.keys_image;
      const int64_t image = place.image * window.all * args.rows * args.columns * row_size;
      for (int64_t k = 0; k < window.taking_part; ++k, ++key) {
        const int64_t cell = window.cell[k] * row_size;
        const auto grad = to.stream ? grad_projected<true, T, C> : grad_projected<false, T, C>;
        grad(space, space.scores + key * pitch, space.slopes + key * pitch, keys_image + cell, heads, width,
             to.grad_keys + image + cell, to.grad_values + image + cell);
      }
      for (int64_t k = window.taking_part; k < window.all; ++k) {
        const int64_t cell = image + window.cell[k] * row_size;
        std::memset(static_cast<void*>(to.grad_keys + cell), 0, row_size * sizeof(T));
        std::memset(static_cast<void*>(to.grad_values + cell), 0, row_size * sizeof(T));
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      narrow(space.out + h * space.row, width, scale, args.grad_q + query * row_size + h * width);
    }
    for (int64_t j = 0; j < args.absorbed_count; ++j) {
      const SvaAbsorbed<T, C>& to = args.absorbed[j];
      const Window& window = windows[args.projected_count + j];
      C* ds = space.slopes + key * pitch;
      sum_mass(args, to, query, window.taking_part, space.scores + key * pitch, pitch);
      for (int64_t i = 0; i < window.taking_part * pitch; ++i) ds[i] *= scale;
      for (int64_t h = 0; h < heads; ++h) {
        C total = 0;
        for (int64_t k = 0; k < window.taking_part; ++k) total += ds[k * pitch + h];
        to.grad_constants[h * args.queries + query] = total;
      }
      grad_absorbed(args, to, space, space.absorbed[j], place, query, window, key);
      key += window.taking_part;
    }
  }
  end_stream();
}

template void backward(const SvaArguments<float, float>&, float*, int64_t, int64_t);
template void backward(const SvaArguments<BFloat16, float>&, float*, int64_t, int64_t);
template void backward(const SvaArguments<double, double>&, double*, int64_t, int64_t);

}  // namespace mmoe::MMOE_SIMD
