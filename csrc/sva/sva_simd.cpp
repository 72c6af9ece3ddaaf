// The forward of sva on the CPU. Two passes over a query: the scores of all its keys, then, after the softmax, the
// sums. Projected encoders are bound by memory: every key and value is read once. Absorbed ones are two small matrix
// products on the normalised window, which stays in the second-level cache between them.
#include "sva/sva_simd.h"

#include "sva/sva_simd_parts.h"

namespace mmoe::MMOE_SIMD {
namespace {

// scores -> a, over the rows of `keys` keys; log of the sum to lse.
template <typename C>
void softmax(C* scores, int64_t keys, int64_t heads, int64_t pitch, C* lse) {
  constexpr int64_t lanes = kLanes<C>;
  for (int64_t head = 0; head < heads; head += lanes) {
    Vec<C> top = load(scores + head);
    for (int64_t k = 1; k < keys; ++k) top = max(top, load(scores + k * pitch + head));
    Vec<C> total{};
    for (int64_t k = 0; k < keys; ++k) {
      const Vec<C> weight = exp(load(scores + k * pitch + head) - top);
      store(scores + k * pitch + head, weight);
      total += weight;
    }
    for (int64_t k = 0; k < keys; ++k) store(scores + k * pitch + head, load(scores + k * pitch + head) / total);
    for (int64_t i = 0; i < lanes && head + i < heads; ++i) lse[head + i] = top[i] + std::log(total[i]);
  }
}

// out[h] += sum over `count` keys of a[key][h] * value_key[h].
template <int kCount, typename T, typename C>
MMOE_INLINE void add_values(const T* const* values, const C* a, int64_t pitch, int64_t heads, int64_t width,
                            int64_t row, C* out) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t head = 0; head < heads; ++head) {
    C* to = out + head * row;
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
      Vec<C> total = load(to + i);
      for (int k = 0; k < kCount; ++k) total += a[k * pitch + head] * load(values[k] + head * width + i);
      store(to + i, total);
    }
    if (i == width) continue;
    Vec<C> total = load(to + i);
    for (int k = 0; k < kCount; ++k) {
      total += a[k * pitch + head] * load_first(values[k] + head * width + i, width - i, C(0));
    }
    store(to + i, total);
  }
}

template <typename T, typename C>
void forward(const SvaArguments<T, C>& args, C* memory, int64_t begin, int64_t end) {
  const Space<C> space = space_in(memory, args);
  const int64_t heads = args.heads, width = args.width, pitch = space.pitch, row_size = heads * width;
  const C scale = 1 / std::sqrt(static_cast<C>(width));
  std::memset(static_cast<void*>(memory), 0, space.elements * sizeof(C));
  Window windows[kSvaEncoders];
  for (int64_t query = begin; query < end; ++query) {
    const Place place = place_of(args, query);
    widen_row(args.q + query * row_size, heads, width, scale, space.q, space.row);
    C* scores = space.scores;
    for (int64_t i = 0; i < args.projected_count; ++i) {
      const SvaProjected<T>& from = args.projected[i];
      find_window(args, place, from.mask, from.window, windows[i]);
      const T* image = from.keys + place.image * from.keys_image;
      for (int64_t k = 0; k < windows[i].taking_part; ++k, scores += pitch) {
        head_products(space.q, image + windows[i].cell[k] * row_size, heads, width, space.row, scores,
                      image + cell_after(windows[i], k) * row_size);
      }
    }
    for (int64_t j = 0; j < args.absorbed_count; ++j) {
      const SvaAbsorbed<T, C>& from = args.absorbed[j];
      Window& window = windows[args.projected_count + j];
      find_window(args, place, from.mask, from.window, window);
      score_absorbed(args, from, space.absorbed[j], place, query, window, scores, pitch);
      for (int64_t k = 0; k < window.taking_part; ++k, scores += pitch) {
        for (int64_t h = 0; h < heads; ++h) {
          scores[h] = (scores[h] + from.constants[h * args.queries + query]) * scale;
        }
      }
    }
    softmax(space.scores, (scores - space.scores) / pitch, heads, pitch, args.lse + query * heads);

    const C* a = space.scores;
    std::memset(static_cast<void*>(space.out), 0, heads * space.row * sizeof(C));
    for (int64_t i = 0; i < args.projected_count; ++i) {
      const SvaProjected<T>& from = args.projected[i];
      const T* image = from.values + place.image * from.values_image;
      for_tiles<4>(windows[i].taking_part, [&](auto tile, int64_t first) {
        constexpr int count = tile();
        const T* values[count];
        for (int k = 0; k < count; ++k) values[k] = image + windows[i].cell[first + k] * row_size;
        add_values<count>(values, a + first * pitch, pitch, heads, width, space.row, space.out);
      });
      a += windows[i].taking_part * pitch;
    }
    for (int64_t h = 0; h < heads; ++h) {
      narrow(space.out + h * space.row, width, C(1), args.out + query * row_size + h * width);
    }
    for (int64_t j = 0; j < args.absorbed_count; ++j) {
      const SvaAbsorbed<T, C>& to = args.absorbed[j];
      const int64_t keys = windows[args.projected_count + j].taking_part, head_step = args.queries * to.channels;
      sum_mass(args, to, query, keys, a, pitch);
      for_blocks<C>(to.channels, [&](auto vectors, int64_t first) __attribute__((always_inline)) {
        pool<vectors()>(a, pitch, space.absorbed[j], keys, heads, first, to.channels, to.pooled + query * to.channels,
                        head_step);
      });
      a += keys * pitch;
    }
  }
}

template <typename T, typename C>
int64_t scratch(const SvaArguments<T, C>& args) {
  return space_in<T, C>(nullptr, args).elements;
}

template <typename T, typename C>
constexpr SvaOf<T, C> of{scratch<T, C>, forward<T, C>, backward<T, C>};

}  // namespace

const SvaKernels sva_kernels{of<float, float>, of<BFloat16, float>, of<double, double>};

}  // namespace mmoe::MMOE_SIMD
