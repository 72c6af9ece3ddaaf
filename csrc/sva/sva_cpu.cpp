// sva on the CPU: queries in parallel on torch's threads, each computed alone.
#include <memory>

#include "common/cpu_types.h"
#include "common/library.h"
#include "common/past_caches.h"
#include "sva/sva.h"
#include "sva/sva_simd.h"

namespace mmoe {
namespace {

constexpr int64_t kQueriesPerTask = 4;

Tensors contiguous(const Tensors& tensors) {
  Tensors made;
  for (const Tensor& tensor : tensors) made.push_back(torch::stable::contiguous(tensor));
  return made;
}

Tensors readable(const Tensors& grids) {
  Tensors made;
  for (const Tensor& grid : grids) made.push_back(sva_readable(grid));
  return made;
}

Tensors empty_like(const Tensors& tensors) {
  Tensors made;
  for (const Tensor& tensor : tensors) made.push_back(torch::stable::new_empty(tensor, tensor.sizes()));
  return made;
}

template <typename T>
const T* data_or_null(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.const_data_ptr<T>();
}

SvaMask mask_of(const Tensor& mask) { return {data_or_null<bool>(mask), mask.numel() == 0 ? 0 : mask.stride(0)}; }

// The tensors of a call, laid out as the kernels read them.
struct Inputs {
  SvaSizes sizes;
  Tensor q;
  Tensors keys, values, features, positions, absorbed, constants, masks;
};

// What the kernels take of them, with the gradients and sums still to be filled in.
template <typename T, typename C>
struct Arguments {
  SvaArguments<T, C> all{};
  std::vector<SvaProjected<T>> projected;
  std::vector<SvaAbsorbed<T, C>> absorbed;

  Arguments(const Inputs& in, Tensors& pooled, Tensors& mass, double eps) {
    for (size_t i = 0; i < in.keys.size(); ++i) {
      SvaProjected<T>& made = projected.emplace_back();
      made.keys = in.keys[i].const_data_ptr<T>();
      made.values = in.values[i].const_data_ptr<T>();
      made.keys_image = in.keys[i].stride(0);
      made.values_image = in.values[i].stride(0);
      made.mask = mask_of(in.masks[i]);
      made.window = in.sizes.window[i];
    }
    for (size_t j = 0; j < in.features.size(); ++j) {
      SvaAbsorbed<T, C>& made = absorbed.emplace_back();
      made.features = in.features[j].const_data_ptr<T>();
      made.features_image = in.features[j].stride(0);
      made.position = data_or_null<T>(in.positions[j]);
      made.absorbed = in.absorbed[j].const_data_ptr<T>();
      made.constants = in.constants[j].const_data_ptr<C>();
      made.pooled = pooled[j].mutable_data_ptr<T>();
      made.mass = mass[j].mutable_data_ptr<C>();
      made.mask = mask_of(in.masks[in.keys.size() + j]);
      made.window = in.sizes.window[in.keys.size() + j];
      made.channels = in.sizes.channels[j];
    }
    all.rows = in.sizes.rows;
    all.columns = in.sizes.columns;
    all.heads = in.sizes.heads;
    all.width = in.sizes.width;
    all.queries = in.sizes.queries();
    all.eps = static_cast<C>(eps);
    all.q = in.q.const_data_ptr<T>();
    all.projected = projected.data();
    all.projected_count = static_cast<int64_t>(projected.size());
    all.absorbed = absorbed.data();
    all.absorbed_count = static_cast<int64_t>(absorbed.size());
  }
};

Inputs inputs(const Tensor& q, const Tensors& keys, const Tensors& values, const Tensors& features,
              const Tensors& positions, const Tensors& absorbed, const Tensors& constants, const Tensors& masks) {
  return {check_sva(q, keys, values, features, positions, absorbed, constants, masks),
          torch::stable::contiguous(q),
          readable(keys),
          readable(values),
          readable(features),
          contiguous(positions),
          contiguous(absorbed),
          contiguous(constants),
          readable(masks)};
}

// Runs a kernel over all queries; one piece of working memory a thread.
template <typename C, typename Arguments, typename Scratch, typename Kernel>
void run(const Arguments& arguments, Scratch scratch, Kernel kernel) {
  const int64_t elements = scratch(arguments.all);
  torch::stable::parallel_for(0, arguments.all.queries, kQueriesPerTask, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<C[]> memory(new C[elements]);
    kernel(arguments.all, memory.get(), begin, end);
  });
}

SvaResult sva_cpu(Tensor q, Tensors keys, Tensors values, Tensors features, Tensors positions, Tensors absorbed,
                  Tensors constants, Tensors masks, double eps) {
  const Inputs in = inputs(q, keys, values, features, positions, absorbed, constants, masks);
  const SvaSizes& sizes = in.sizes;
  const ScalarType sums = sum_type(q.scalar_type());
  Tensor out = torch::stable::new_empty(q, {sizes.batch, sizes.rows, sizes.columns, sizes.heads * sizes.width});
  Tensor lse = torch::stable::new_empty(q, {sizes.batch, sizes.rows, sizes.columns, sizes.heads}, sums);
  Tensors pooled = empty_like(absorbed), mass = empty_like(constants);
  for_cpu_type(sva_kernels(), q.scalar_type(), "sva: q", [&](const auto& kernels, auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    Arguments<T, C> arguments(in, pooled, mass, eps);
    arguments.all.out = out.mutable_data_ptr<T>();
    arguments.all.lse = lse.mutable_data_ptr<C>();
    run<C>(arguments, kernels.scratch, kernels.forward);
  });
  return {out, lse, pooled, mass};
}

SvaGradients sva_backward_cpu(Tensor grad_out_any, Tensors grad_pooled_any, Tensors grad_mass_any, Tensor q,
                              Tensors keys, Tensors values, Tensors features, Tensors positions, Tensors absorbed,
                              Tensors constants, Tensors masks, Tensor lse_any, double eps) {
  const Inputs in = inputs(q, keys, values, features, positions, absorbed, constants, masks);
  check_sva_backward(in.sizes, grad_out_any, grad_pooled_any, grad_mass_any, q, lse_any);
  const Tensor grad_out = torch::stable::contiguous(grad_out_any), lse = torch::stable::contiguous(lse_any);
  const Tensors grad_pooled = contiguous(grad_pooled_any), grad_mass = contiguous(grad_mass_any);
  Tensor grad_q = torch::stable::new_empty(q, q.sizes());
  Tensors grad_keys = empty_like(keys), grad_values = empty_like(values), grad_features = empty_like(features);
  Tensors grad_absorbed = empty_like(absorbed), grad_constants = empty_like(constants);
  Tensors pooled = empty_like(absorbed), mass = empty_like(constants);
  for_cpu_type(sva_kernels(), q.scalar_type(), "sva: q", [&](const auto& kernels, auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    Arguments<T, C> arguments(in, pooled, mass, eps);
    for (size_t i = 0; i < keys.size(); ++i) {
      SvaProjected<T>& part = arguments.projected[i];
      part.grad_keys = grad_keys[i].mutable_data_ptr<T>();
      part.grad_values = grad_values[i].mutable_data_ptr<T>();
      const int64_t rows = grad_keys[i].numel() / in.sizes.width, row_bytes = in.sizes.width * sizeof(T);
      part.stream = streams(part.grad_keys, rows, row_bytes) && streams(part.grad_values, rows, row_bytes);
    }
    for (size_t j = 0; j < features.size(); ++j) {
      SvaAbsorbed<T, C>& part = arguments.absorbed[j];
      part.grad_pooled = data_or_null<T>(grad_pooled[j]);
      part.grad_mass = data_or_null<C>(grad_mass[j]);
      part.grad_features = grad_features[j].mutable_data_ptr<T>();
      part.grad_absorbed = grad_absorbed[j].mutable_data_ptr<T>();
      part.grad_constants = grad_constants[j].mutable_data_ptr<C>();
    }
    arguments.all.lse = const_cast<C*>(lse.const_data_ptr<C>());  // the backward only reads it
    arguments.all.grad_out = data_or_null<T>(grad_out);
    arguments.all.grad_q = grad_q.mutable_data_ptr<T>();
    run<C>(arguments, kernels.scratch, kernels.backward);
  });
  return {grad_q, grad_keys, grad_values, grad_features, grad_absorbed, grad_constants, pooled, mass};
}

}  // namespace

MMOE_CPU(m) {
  m.impl("sva", TORCH_BOX(&sva_cpu));
  m.impl("sva_backward", TORCH_BOX(&sva_backward_cpu));
}

}  // namespace mmoe
