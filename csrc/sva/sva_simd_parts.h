// What the forward and the backward of sva share on the CPU: a query's windows, its working memory, and the products.
//
// Scores and what derives from them lie [key][head], heads padded to a vector, so that the softmax runs over the heads
// of a vector at once. Rows of an absorbed encoder are brought to the compute type with zeros up to a whole vector, so
// that the products have no tails; the 64 bytes between rows keep rows of 4 KB from falling into one set of the cache.
#pragma once

#include "common/simd.h"
#include "sva/sva_simd.h"

namespace mmoe::MMOE_SIMD {

// A tile of sums in registers: 4 rows by 4 vectors of 32 registers with AVX-512, by 2 of 16 otherwise.
constexpr int kTileRows = 4;
constexpr int kTileVectors = kBytes == 64 ? 4 : 2;

constexpr int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Calls body(integral_constant kTile or 1, first) until `count` are covered.
template <int kTile, typename Body>
MMOE_INLINE void for_tiles(int64_t count, Body&& body) {
  int64_t first = 0;
  for (; first + kTile <= count; first += kTile) body(std::integral_constant<int, kTile>{}, first);
  for (; first < count; ++first) body(std::integral_constant<int, 1>{}, first);
}

// The same for the vectors of a row of `channels`, `first` in elements; only a block of one vector may end beyond them.
template <typename C, typename Body>
MMOE_INLINE void for_blocks(int64_t channels, Body&& body) {
  constexpr int64_t lanes = kLanes<C>;
  for_tiles<kTileVectors>(channels / lanes, [&](auto vectors, int64_t first)
                                                __attribute__((always_inline)) { body(vectors, first * lanes); });
  if (channels % lanes != 0) body(std::integral_constant<int, 1>{}, channels / lanes * lanes);
}

struct Place {
  int64_t image, row, column;
};

template <typename T, typename C>
Place place_of(const SvaArguments<T, C>& args, int64_t query) {
  const int64_t cells = args.rows * args.columns;
  return {query / cells, query % cells / args.columns, query % args.columns};
}

// The cells of a query's window in one encoder's grid, as element offsets inside the image.
struct Window {
  int64_t taking_part, all;
  int64_t cell[kSvaWindow * kSvaWindow];  // those that take part before the others
};

template <typename T, typename C>
void find_window(const SvaArguments<T, C>& args, const Place& place, const SvaMask& mask, int64_t m, Window& window) {
  const int64_t columns = args.columns * m, first = place.row * m * columns + place.column * m;
  const bool* valid = mask.data == nullptr ? nullptr : mask.data + place.image * mask.image;
  window.all = m * m;
  int64_t taking = 0, left = window.all;
  for (int64_t i = 0; i < window.all; ++i) {
    const int64_t cell = first + i / m * columns + i % m;
    if (valid == nullptr || valid[cell]) window.cell[taking++] = cell;
  }
  if (taking == 0) {
    for (int64_t i = 0; i < window.all; ++i) window.cell[i] = first + i / m * columns + i % m;
    taking = window.all;
  } else if (taking < window.all) {
    for (int64_t i = window.all - 1; i >= 0; --i) {
      const int64_t cell = first + i / m * columns + i % m;
      if (!valid[cell]) window.cell[--left] = cell;
    }
  }
  window.taking_part = taking;
}

// The cell that is read after the k-th; the last is followed by itself.
MMOE_INLINE int64_t cell_after(const Window& window, int64_t k) {
  return window.cell[k + 1 < window.taking_part ? k + 1 : k];
}

// The row of `cell` among those of the m * m learned positions.
template <typename T, typename C>
int64_t position_of(const SvaArguments<T, C>& args, int64_t cell, int64_t m) {
  const int64_t columns = args.columns * m;
  return cell / columns % m * m + cell % columns % m;
}

// Working memory of one thread for one query.
template <typename C>
struct AbsorbedSpace {
  int64_t stride;  // of the rows below
  C* normed;       // x^ of the keys
  C* absorbed;     // a row for every head
  C* grad_pooled;  // likewise
  C* inverse;      // 1 / sqrt(variance + eps) of every key
  C* sums;         // of the rows of absorbed, then of grad_pooled, over the channels
};

template <typename C>
struct Space {
  int64_t pitch;  // of a row of scores
  int64_t row;    // of a head of q, out, grad_out
  C *q, *out, *grad_out;
  C *scores, *slopes;           // [key][head]: scores, then a; the gradient of a, then of the score
  C *products, *grad_products;  // [key][head] of absorbed encoders: absorbed.x^ and grad_pooled.x^
  AbsorbedSpace<C> absorbed[kSvaEncoders];
  int64_t elements;
};

template <typename T, typename C>
Space<C> space_in(C* memory, const SvaArguments<T, C>& args) {
  Space<C> space;
  int64_t used = 0, keys = 0;
  const auto take = [&](int64_t count) {
    C* const part = memory + used;
    used += round_up(count, 16);
    return part;
  };
  for (int64_t i = 0; i < args.projected_count; ++i) keys += args.projected[i].window * args.projected[i].window;
  for (int64_t j = 0; j < args.absorbed_count; ++j) keys += args.absorbed[j].window * args.absorbed[j].window;
  space.pitch = round_up(args.heads, 16);
  space.row = round_up(args.width, kLanes<C>);
  space.q = take(args.heads * space.row);
  space.out = take(args.heads * space.row);
  space.grad_out = take(args.heads * space.row);
  space.scores = take(keys * space.pitch);
  space.slopes = take(keys * space.pitch);
  space.products = take(keys * space.pitch);
  space.grad_products = take(keys * space.pitch);
  for (int64_t j = 0; j < args.absorbed_count; ++j) {
    AbsorbedSpace<C>& part = space.absorbed[j];
    const int64_t cells = args.absorbed[j].window * args.absorbed[j].window;
    const int64_t heads = round_up(args.heads, kTileRows);
    part.stride = round_up(args.absorbed[j].channels, 16) + 16;
    part.normed = take(cells * part.stride);
    part.absorbed = take(heads * part.stride);
    part.grad_pooled = take(heads * part.stride);
    part.inverse = take(cells);
    part.sums = take(2 * space.pitch);
  }
  space.elements = used;
  return space;
}

// `to` = factor * `from`, with zeros up to `padded`, a multiple of a vector. `next` is the row that is read after this
// one: rows lie too far apart for the hardware to guess it.
template <typename T, typename C>
MMOE_INLINE void widen(const T* from, int64_t count, int64_t padded, C factor, C* to, const T* next) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    __builtin_prefetch(next + i);
    store(to + i, load(from + i) * factor);
  }
  if (i < count) store(to + i, load_first(from + i, count - i, C(0)) * factor), i += lanes;
  for (; i < padded; i += lanes) store(to + i, Vec<C>{});
}

template <typename T, typename C>
MMOE_INLINE void narrow(const C* from, int64_t count, C factor, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i) * factor);
  if (i < count) store_first(to + i, load(from + i) * factor, count - i);
}

// A row of q, out or grad_out, by head and in the compute type.
template <typename T, typename C>
void widen_row(const T* from, int64_t heads, int64_t width, C factor, C* to, int64_t row) {
  for (int64_t h = 0; h < heads; ++h) {
    widen(from + h * width, width, row, factor, to + h * row, from + (h + 1 < heads ? h + 1 : h) * width);
  }
}

// to[h] = left_h . right_h for the heads of one key: left in the compute type with padded rows, right as stored. `next`
// is the row that is read after this one.
template <typename T, typename C>
void head_products(const C* left, const T* right, int64_t heads, int64_t width, int64_t row, C* to, const T* next) {
  constexpr int64_t lanes = kLanes<T>;
  const auto product = [&](int64_t head) __attribute__((always_inline)) {
    const C* a = left + head * row;
    const T* b = right + head * width;
    Vec<C> total{};
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
      __builtin_prefetch(next + head * width + i);
      total += load(a + i) * load(b + i);
    }
    if (i < width) total += load(a + i) * load_first(b + i, width - i, C(0));
    return total;
  };
  int64_t head = 0;
  for (; head + lanes <= heads; head += lanes) {
    Vec<C> totals[lanes];
    for (int64_t i = 0; i < lanes; ++i) totals[i] = product(head + i);
    store(to + head, sum_each(totals));
  }
  for (; head < heads; ++head) to[head] = sum(product(head));
}

// to[key * pitch + head] = left_head . right_key. Left has rows up to a multiple of kTileRows heads.
template <typename C>
void products(const C* left, const C* right, int64_t stride, int64_t heads, int64_t keys, int64_t padded, C* to,
              int64_t pitch) {
  constexpr int64_t lanes = kLanes<C>;
  for_tiles<kTileVectors>(keys, [&](auto tile, int64_t key) {
    constexpr int count = tile();
    for (int64_t head = 0; head < heads; head += kTileRows) {
      const C *a = left + head * stride, *b = right + key * stride;
      Vec<C> totals[count * kTileRows]{};
      for (int64_t i = 0; i < padded; i += lanes) {
        Vec<C> rows[kTileRows];
        for (int h = 0; h < kTileRows; ++h) rows[h] = load(a + h * stride + i);
        for (int k = 0; k < count; ++k) {
          const Vec<C> one = load(b + k * stride + i);
          for (int h = 0; h < kTileRows; ++h) totals[k * kTileRows + h] += rows[h] * one;
        }
      }
      C all[count * kTileRows];
      if constexpr (count * kTileRows % lanes == 0) {
        for (int i = 0; i < count * kTileRows; i += lanes) store(all + i, sum_each(totals + i));
      } else {
        for (int i = 0; i < count * kTileRows; ++i) all[i] = sum(totals[i]);
      }
      for (int k = 0; k < count; ++k) {
        std::memcpy(to + (key + k) * pitch + head, all + k * kTileRows, kTileRows * sizeof(C));
      }
    }
  });
}

// sums[i][v] += sum over j < count of weights[i * row_step + j * step] * rows[j * stride + v-th vector]. Loops over a
// tile are unrolled by pragma here and wherever it is read: an index that stays variable puts the tile into memory.
template <int kRows, int kVectors, typename C>
MMOE_INLINE void accumulate(Vec<C> (&sums)[kRows][kVectors], const C* weights, int64_t row_step, int64_t step,
                            const C* rows, int64_t stride, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    Vec<C> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(rows + j * stride + v * kLanes<C>);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const C weight = weights[i * row_step + j * step];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] += weight * row[v];
    }
  }
}

// Stores vectors from the element `first` of a row on; a block of one vector may end beyond `channels` (for_blocks).
template <int kVectors, typename T, typename C = Compute<T>>
MMOE_INLINE void store_block(T* row, int64_t first, int64_t channels, const Vec<C> (&values)[kVectors]) {
  if (kVectors == 1 && first + kLanes<T> > channels) {
    store_first(row + first, values[0], channels - first);
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(row + first + v * kLanes<T>, values[v]);
}

// to[head][channel] = sum over the keys of weights[key][head] * normed[key][channel], for a block of vectors.
template <int kVectors, typename T, typename C>
MMOE_INLINE void pool(const C* weights, int64_t pitch, const AbsorbedSpace<C>& space, int64_t keys, int64_t heads,
                      int64_t first, int64_t channels, T* to, int64_t head_step) {
  for_tiles<kTileRows>(heads, [&](auto tile, int64_t head) __attribute__((always_inline)) {
    constexpr int count = tile();
    Vec<C> sums[count][kVectors]{};
    accumulate(sums, weights + head, 1, pitch, space.normed + first, space.stride, keys);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) store_block(to + (head + i) * head_step, first, channels, sums[i]);
  });
}

// The normalised row of features + position, zeros up to `padded`; returns 1 / sqrt(variance + eps). `next` as in
// widen.
template <typename T, typename C>
C normalise(const T* features, const T* position, int64_t channels, int64_t padded, C eps, C* to, const T* next) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr int apart = 4;  // independent sums, since an addition takes four cycles
  const int64_t whole = channels - channels % lanes, body = whole - whole % (apart * lanes);
  Vec<C> sums[apart]{}, squares[apart]{};
  const auto mean_of = [&](const Vec<C>* parts) {
    return sum((parts[0] + parts[1]) + (parts[2] + parts[3])) / static_cast<C>(channels);
  };
  const auto read = [&](int64_t i, Vec<C>& total) __attribute__((always_inline)) {
    __builtin_prefetch(next + i);
    const Vec<C> values = position == nullptr ? load(features + i) : load(features + i) + load(position + i);
    store(to + i, values);
    total += values;
  };
  for (int64_t i = 0; i < body; i += apart * lanes) {
    for (int j = 0; j < apart; ++j) read(i + j * lanes, sums[j]);
  }
  for (int64_t i = body; i < whole; i += lanes) read(i, sums[0]);
  if (whole < channels) {
    Vec<C> values = load_first(features + whole, channels - whole, C(0));
    if (position != nullptr) values += load_first(position + whole, channels - whole, C(0));
    store(to + whole, values);
    sums[0] += values;
  }
  const C mean = mean_of(sums);
  const auto centre = [&](int64_t i, Vec<C>& total) __attribute__((always_inline)) {
    const Vec<C> values = load(to + i) - mean;
    store(to + i, values);
    total += values * values;
  };
  for (int64_t i = 0; i < body; i += apart * lanes) {
    for (int j = 0; j < apart; ++j) centre(i + j * lanes, squares[j]);
  }
  for (int64_t i = body; i < whole; i += lanes) centre(i, squares[0]);
  if (whole < channels) {
    const Vec<C> rest = load(to + whole) - mean;
    const Vec<C> values = index_below<C>(channels - whole) ? rest : Vec<C>{};
    store(to + whole, values);
    squares[0] += values * values;
  }
  const C inverse = 1 / std::sqrt(mean_of(squares) + eps);
  for (int64_t i = 0; i < channels; i += lanes) store(to + i, load(to + i) * inverse);
  for (int64_t i = round_up(channels, lanes); i < padded; i += lanes) store(to + i, Vec<C>{});
  return inverse;
}

// Brings the rows of all heads of one query, `head_step` apart, to the compute type.
template <typename T, typename C>
void widen_heads(const T* from, int64_t head_step, int64_t heads, int64_t channels, C* to, int64_t stride) {
  for (int64_t h = 0; h < heads; ++h) {
    const T* const next = from + (h + 1 < heads ? h + 1 : h) * head_step;
    widen(from + h * head_step, channels, round_up(channels, 16), C(1), to + h * stride, next);
  }
}

// Normalises the window of an absorbed encoder, brings absorbed to the compute type, and writes absorbed.x^ to scores.
template <typename T, typename C>
void score_absorbed(const SvaArguments<T, C>& args, const SvaAbsorbed<T, C>& from, const AbsorbedSpace<C>& space,
                    const Place& place, int64_t query, const Window& window, C* scores, int64_t pitch) {
  const int64_t channels = from.channels, padded = round_up(channels, 16);
  const T* image = from.features + place.image * from.features_image;
  for (int64_t k = 0; k < window.taking_part; ++k) {
    const int64_t cell = window.cell[k];
    const T* position = from.position;
    if (position != nullptr) position += position_of(args, cell, from.window) * channels;
    const T* const next = image + cell_after(window, k) * channels;
    space.inverse[k] =
        normalise(image + cell * channels, position, channels, padded, args.eps, space.normed + k * space.stride, next);
  }
  widen_heads(from.absorbed + query * channels, args.queries * channels, args.heads, channels, space.absorbed,
              space.stride);
  products(space.absorbed, space.normed, space.stride, args.heads, window.taking_part, padded, scores, pitch);
}

// mass of one absorbed encoder.
template <typename T, typename C>
void sum_mass(const SvaArguments<T, C>& args, const SvaAbsorbed<T, C>& to, int64_t query, int64_t keys, const C* a,
              int64_t pitch) {
  for (int64_t h = 0; h < args.heads; ++h) {
    C total = 0;
    for (int64_t k = 0; k < keys; ++k) total += a[k * pitch + h];
    to.mass[h * args.queries + query] = total;
  }
}

// In sva_backward_simd.cpp.
template <typename T, typename C>
void backward(const SvaArguments<T, C>& args, C* memory, int64_t begin, int64_t end);

}  // namespace mmoe::MMOE_SIMD
