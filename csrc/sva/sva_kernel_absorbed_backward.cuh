// The backward of sva over absorbed encoders on the device; its story is in sva_kernel_absorbed.cuh. No torch in this
// file.
//
// Not yet run on a GPU.
#pragma once

#include "sva/sva_kernel_absorbed_parts.cuh"

namespace mmoe::sva {

// The planes of weights: dot products of x^ with absorbed and grad_pooled at first, then a and ds.
struct Planes {
  float* weights;
  float* slopes;
  float* products;  // a key's and head's part of the sum of grad_x^ * x^

  __device__ __forceinline__ Planes(const AbsorbedLayout& layout, unsigned char* memory)
      : weights(reinterpret_cast<float*>(memory + layout.weights)),
        slopes(reinterpret_cast<float*>(memory + layout.slopes)),
        products(reinterpret_cast<float*>(memory + layout.products)) {}
};

// Absorbed and grad_pooled summed over the channels, [2][H].
__device__ __forceinline__ float* sums_of(const AbsorbedLayout& layout, int heads, int encoder, unsigned char* memory) {
  return reinterpret_cast<float*>(memory + layout.sums) + encoder * 2 * heads;
}

// Dot products into the planes, and the sums and, where it has a place, the copy of absorbed and grad_pooled. A warp a
// head.
template <typename T, bool kStaged>
__device__ void multiply_window(const Absorbed<T>& args, const Query& query, int encoder, unsigned char* memory) {
  using Item = Item<T, kStaged>;
  const Seen<T, kStaged> seen(args, query, encoder, memory);
  const Planes planes(args.layout, memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int heads = args.queries.heads, keys = seen.keys();
  float* sums = sums_of(args.layout, heads, encoder, memory);
  for (int head = warp; head < heads; head += kAbsorbedWarps) {
    const T* absorbed = row_of_head(seen.at.absorbed, seen.at, head, args.count, query.index);
    const T* grad = seen.at.grad_pooled == nullptr
                        ? nullptr
                        : row_of_head(seen.at.grad_pooled, seen.at, head, args.count, query.index);
    float sum_absorbed = 0.0f, sum_grad = 0.0f;
    for (int from = 0; from < keys; from += kKeysOfTile) {
      const float dot =
          tile_of_dots(args, query, seen, absorbed, grad, from, keys, [&](int item, auto& one, auto& two) {
            if (from > 0) return;
#pragma unroll
            for (int i = 0; i < Item::kCount; ++i) {
              sum_absorbed += one[i];
              sum_grad += two[i];
            }
            if (seen.streams != nullptr) {
              Item::write(seen.streams + head * seen.at.channels + item * Item::kCount, one);
              Item::write(seen.streams + (heads + head) * seen.at.channels + item * Item::kCount, two);
            }
          });
      const int key = from + lane % kKeysOfTile;
      float* plane = lane < kKeysOfTile ? planes.weights : planes.slopes;
      if (key < keys) plane[head * args.layout.row + seen.first_key + key] = dot;
    }
    sum_absorbed = warp_sum(sum_absorbed);
    sum_grad = warp_sum(sum_grad);
    if (lane == 0) {
      sums[head] = sum_absorbed;
      sums[heads + head] = sum_grad;
    }
  }
}

// Dot products to a, ds and products, a warp a head; mass and the gradient of the constants. others [B, R, W, H] or
// null: sum of a * da over the keys of other encoders. Weights are 0 up to a multiple of kSums keys.
template <typename T, bool kStaged>
__device__ void slope_of_scores(const Absorbed<T>& args, const Query& query, const float* __restrict__ lse,
                                const float* __restrict__ others, float* __restrict__ delta_of_head,
                                unsigned char* memory) {
  const Planes planes(args.layout, memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int head = warp; head < args.queries.heads; head += kAbsorbedWarps) {
    const int of_head = query.index * args.queries.heads + head;
    const int64_t of_query = static_cast<int64_t>(head) * args.count + query.index;
    const float total = lse[of_head];
    const auto for_keys = [&](int encoder, auto&& body) {
      const Seen<T, kStaged> seen(args, query, encoder, memory);
      const float grad_mass = seen.at.grad_mass == nullptr ? 0.0f : seen.at.grad_mass[of_query];
      const int keys = seen.keys(), row = head * args.layout.row + seen.first_key;
      for (int key = lane; key < (keys + kSums - 1) / kSums * kSums; key += kWarp)
        body(row + key, key < keys, grad_mass);
    };
    float delta = 0.0f;
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      const float constant = args.encoder[encoder].constants[of_query];
      for_keys(encoder, [&](int at, bool counts, float grad_mass) {
        const float dot = counts ? planes.weights[at] : 0.0f, slope = counts ? planes.slopes[at] : 0.0f;
        const float weight = counts ? __expf(args.scale * (dot + constant) - total) : 0.0f;
        planes.products[at] = dot;
        planes.weights[at] = weight;
        planes.slopes[at] = slope;
        delta = counts ? fmaf(weight, slope + grad_mass, delta) : delta;
      });
    }
    delta = warp_sum(delta);
    if (lane == 0 && delta_of_head != nullptr) delta_of_head[of_head] = delta;
    if (others != nullptr) delta += others[of_head];
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      float mass = 0.0f, grad_constant = 0.0f;
      for_keys(encoder, [&](int at, bool, float grad_mass) {
        const float weight = planes.weights[at], grad = planes.slopes[at];
        const float slope = args.scale * weight * (grad + grad_mass - delta);
        planes.products[at] = weight * grad + slope * planes.products[at];
        planes.slopes[at] = slope;
        mass += weight;
        grad_constant += slope;
      });
      mass = warp_sum(mass);
      grad_constant = warp_sum(grad_constant);
      if (lane == 0) {
        args.encoder[encoder].mass[of_query] = mass;
        args.encoder[encoder].grad_constants[of_query] = grad_constant;
      }
    }
  }
}

// The means over the channels of grad_x^ and of grad_x^ * x^, a warp kKeysOfTile keys, kTileRows heads at a time.
template <typename T, bool kStaged>
__device__ void average_gradient(const Absorbed<T>& args, const Query& query, int encoder, unsigned char* memory) {
  const Seen<T, kStaged> seen(args, query, encoder, memory);
  const Planes planes(args.layout, memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int heads = args.queries.heads, keys = seen.keys();
  const float* sums = sums_of(args.layout, heads, encoder, memory);
  const float channels = static_cast<float>(seen.at.channels);
  float2* means = reinterpret_cast<float2*>(memory + args.layout.means) + seen.first_key;
  // Encoders of one tile each go to different warps.
  for (int from = (warp + encoder) % kAbsorbedWarps * kKeysOfTile; from < keys; from += kAbsorbedWarps * kKeysOfTile) {
    const int key = from + lane % kKeysOfTile;
    float plain = 0.0f, product = 0.0f;
    for (int head = lane / kKeysOfTile; head < heads && key < keys; head += kTileRows) {
      const int at = head * args.layout.row + seen.first_key + key;
      plain += planes.weights[at] * sums[heads + head] + planes.slopes[at] * sums[head];
      product += planes.products[at];
    }
#pragma unroll
    for (int reach = kKeysOfTile; reach < kWarp; reach *= 2) {
      plain += __shfl_xor_sync(kAllLanes, plain, reach);
      product += __shfl_xor_sync(kAllLanes, product, reach);
    }
    if (lane < kKeysOfTile && key < keys) means[key] = make_float2(plain / channels, product / channels);
  }
}

// The features' gradient, kSums keys and a vector a lane at a time; 0 for the cells that do not count.
template <typename T, bool kStaged>
__device__ void write_feature_gradient(const Absorbed<T>& args, const Query& query, int encoder,
                                       unsigned char* memory) {
  using Item = Item<T, kStaged>;
  const Seen<T, kStaged> seen(args, query, encoder, memory);
  const Planes planes(args.layout, memory);
  const float2* means = reinterpret_cast<const float2*>(memory + args.layout.means) + seen.first_key;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int heads = args.queries.heads, keys = seen.keys(), cells = seen.at.window * seen.at.window;
  const int64_t first_row = static_cast<int64_t>(query.image) * args.queries.rows * args.queries.columns * cells;
  const auto gradient = [&](int cell) {
    return seen.at.grad_features +
           (first_row + row_of_cell(args.queries, query, seen.at.window, cell)) * seen.at.channels;
  };
  const int chunks = (seen.items + kWarp - 1) / kWarp, groups = (keys + kSums - 1) / kSums;
  for (int task = warp; task < groups * chunks; task += kAbsorbedWarps) {
    const int key = task / chunks * kSums, item = task % chunks * kWarp + lane;
    if (item >= seen.items) continue;
    float sums[kSums][Item::kCount] = {};
    for (int head = 0; head < heads; ++head) {
      float absorbed[Item::kCount], grad[Item::kCount] = {};
      if (seen.streams != nullptr) {
        Item::read(seen.streams + head * seen.at.channels + item * Item::kCount, absorbed);
        Item::read(seen.streams + (heads + head) * seen.at.channels + item * Item::kCount, grad);
      } else {
        Item::read(row_of_head(seen.at.absorbed, seen.at, head, args.count, query.index) + item * Item::kCount,
                   absorbed);
        if (seen.at.grad_pooled != nullptr) {
          Item::read(row_of_head(seen.at.grad_pooled, seen.at, head, args.count, query.index) + item * Item::kCount,
                     grad);
        }
      }
      const int at = head * args.layout.row + seen.first_key + key;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float weight = planes.weights[at + i], slope = planes.slopes[at + i];
#pragma unroll
        for (int j = 0; j < Item::kCount; ++j) {
          sums[i][j] = fmaf(weight, grad[j], fmaf(slope, absorbed[j], sums[i][j]));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (key + i >= keys) break;
      float x[Item::kCount];
      seen.read_normed(args.queries, query, key + i, item, x);
      const float deviation = seen.moments[key + i].y;
      const float2 mean = means[key + i];
#pragma unroll
      for (int j = 0; j < Item::kCount; ++j) x[j] = deviation * (sums[i][j] - mean.x - x[j] * mean.y);
      Item::write(gradient(seen.cells[key + i]) + item * Item::kCount, x);
    }
  }
  for (int cell = warp; cell < cells; cell += kAbsorbedWarps) {
    if (*seen.valid >> cell & 1) continue;
    const float nothing[Item::kCount] = {};
    for (int item = lane; item < seen.items; item += kWarp) Item::write(gradient(cell) + item * Item::kCount, nothing);
  }
}

// lse [B, R, W, H] of the forward, over all encoders. delta_of_head [B, R, W, H] or null: sum of a * da over the keys
// of these encoders. <<<blocks, kAbsorbedThreads, AbsorbedLayout::bytes>>>
template <typename T, bool kStaged>
__global__ void __launch_bounds__(kAbsorbedThreads, kAbsorbedBlocks)
    absorbed_backward_kernel(const __grid_constant__ Absorbed<T> args, const float* __restrict__ lse,
                             const float* __restrict__ others, float* __restrict__ delta_of_head) {
  MMOE_DYNAMIC_SHARED(unsigned char, memory);
  const Planes planes(args.layout, memory);
  const int heads = args.queries.heads;
  stage_positions<T, kStaged>(args, memory);
  for (int index = static_cast<int>(blockIdx.x); index < args.count; index += static_cast<int>(gridDim.x)) {
    const Query query = query_at(args.queries, static_cast<unsigned>(index));
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      normalise_window<T, kStaged>(args, query, encoder, memory);
    }
    __syncthreads();
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      multiply_window<T, kStaged>(args, query, encoder, memory);
    }
    __syncthreads();
    slope_of_scores<T, kStaged>(args, query, lse, others, delta_of_head, memory);
    __syncthreads();
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      average_gradient<T, kStaged>(args, query, encoder, memory);
    }
    __syncthreads();
    for (int encoder = 0; encoder < args.encoders; ++encoder) {
      const Seen<T, kStaged> seen(args, query, encoder, memory);
      // pooled and the gradient of absorbed, of two heads each.
      mix(args, query, seen, (heads + 1) / 2, [&](int group, int i) {
        const int head = min(group * 2 + i / 2, heads - 1);
        const float* plane = i % 2 == 0 ? planes.weights : planes.slopes;
        T* to = row_of_head(i % 2 == 0 ? seen.at.pooled : seen.at.grad_absorbed, seen.at, head, args.count, index);
        return Mixture<T>{plane + head * args.layout.row + seen.first_key, group * 2 + i / 2 < heads ? to : nullptr};
      });
      write_feature_gradient<T, kStaged>(args, query, encoder, memory);
    }
    __syncthreads();
  }
}

}  // namespace mmoe::sva
