// The CPU kernels of sva on plain memory, a range of queries a call; the contract is in sva.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <tuple>

#include "common/simd_dispatch.h"
#include "sva/sva_limits.h"

namespace mmoe {

struct SvaMask {
  const bool* data;  // null: every key takes part
  int64_t image;     // elements from one image to the next
};

template <typename T>
struct SvaProjected {
  const T *keys, *values;
  int64_t keys_image, values_image;
  T *grad_keys, *grad_values;  // contiguous; null in the forward, as everything named grad_
  bool stream;                 // the gradients do not fit the caches, and their rows are whole cache lines
  SvaMask mask;
  int64_t window;  // m
};

template <typename T, typename C>
struct SvaAbsorbed {
  const T* features;
  int64_t features_image;
  const T* position;  // may be null
  const T* absorbed;
  const C* constants;
  T* pooled;
  C* mass;
  const T* grad_pooled;  // may be null
  const C* grad_mass;    // may be null
  T *grad_features, *grad_absorbed;
  C* grad_constants;
  SvaMask mask;
  int64_t window, channels;
};

template <typename T, typename C>
struct SvaArguments {
  int64_t rows, columns, heads, width, queries;
  C eps;
  const T* q;
  T* out;
  C* lse;             // read by the backward
  const T* grad_out;  // may be null
  T* grad_q;
  const SvaProjected<T>* projected;
  int64_t projected_count;
  const SvaAbsorbed<T, C>* absorbed;
  int64_t absorbed_count;
};

template <typename T, typename C>
struct SvaOf {
  // Elements of C that a call of forward or backward works in.
  int64_t (*scratch)(const SvaArguments<T, C>&);
  void (*forward)(const SvaArguments<T, C>&, C* scratch, int64_t begin, int64_t end);
  void (*backward)(const SvaArguments<T, C>&, C* scratch, int64_t begin, int64_t end);
};

using SvaKernels = std::tuple<SvaOf<float, float>, SvaOf<torch::headeronly::BFloat16, float>, SvaOf<double, double>>;

MMOE_DECLARE_SIMD(SvaKernels, sva_kernels)

}  // namespace mmoe
