// sva on CUDA: the operator and its gradient, and their registration.
#include "common/library.h"
#include "sva/sva_launch.h"

namespace mmoe::sva {
namespace {

AbsorbedResult new_absorbed_result(const Problem& problem) {
  AbsorbedResult made;
  for (size_t j = 0; j < problem.features.size(); ++j) {
    made.pooled.push_back(new_like(problem.absorbed[j]));
    made.mass.push_back(new_like(problem.constants[j]));
  }
  return made;
}

SvaResult sva_cuda(Tensor q, Tensors keys, Tensors values, Tensors features, Tensors positions, Tensors absorbed,
                   Tensors constants, Tensors masks, double eps) {
  const Problem problem(q, keys, values, features, positions, absorbed, constants, masks, eps);
  const DeviceScope scope(q);
  const SvaSizes& sizes = problem.sizes;
  const bool projects = !keys.empty(), absorbs = !features.empty();
  Tensor out = torch::stable::new_empty(q, {sizes.batch, sizes.rows, sizes.columns, problem.channels()});
  Tensor lse = torch::stable::new_empty(q, {sizes.batch, sizes.rows, sizes.columns, sizes.heads}, ScalarType::Float);
  const AbsorbedResult result = new_absorbed_result(problem);
  if (sizes.queries() == 0) return {out, lse, result.pooled, result.mass};
  if (!projects) torch::stable::zero_(out);
  // The two kinds of encoders share a softmax: the first pass over the keys tells the features' kernel what they add up
  // to, the second learns what the features add up to.
  Tensor lse_of_features = lse;
  if (projects && absorbs) {
    lse_of_features = new_like(lse);
    launch_projected(scope, problem, nullptr, nullptr, lse);
  }
  if (absorbs) {
    launch_absorbed(scope, problem, result, projects ? floats(lse) : nullptr, data<float>(lse_of_features));
  }
  if (projects) launch_projected(scope, problem, absorbs ? floats(lse_of_features) : nullptr, &out, lse);
  return {out, lse, result.pooled, result.mass};
}

SvaGradients sva_backward_cuda(Tensor grad_out_any, Tensors grad_pooled, Tensors grad_mass, Tensor q, Tensors keys,
                               Tensors values, Tensors features, Tensors positions, Tensors absorbed, Tensors constants,
                               Tensors masks, Tensor lse_any, double eps) {
  const Problem problem(q, keys, values, features, positions, absorbed, constants, masks, eps);
  check_sva_backward(problem.sizes, grad_out_any, grad_pooled, grad_mass, q, lse_any);
  const DeviceScope scope(q);
  const bool projects = !keys.empty(), absorbs = !features.empty();
  const Tensor grad_out = torch::stable::contiguous(grad_out_any), lse = torch::stable::contiguous(lse_any);
  Tensor grad_q = new_like(q);
  Tensors grad_keys, grad_values;
  for (const Tensor& grid : keys) {
    grad_keys.push_back(new_like(grid));
    grad_values.push_back(new_like(grid));
  }
  AbsorbedResult result = new_absorbed_result(problem);
  result.grad_pooled = contiguous(grad_pooled);
  result.grad_mass = contiguous(grad_mass);
  for (size_t j = 0; j < features.size(); ++j) {
    result.grad_features.push_back(new_like(features[j]));
    result.grad_absorbed.push_back(new_like(absorbed[j]));
    result.grad_constants.push_back(new_like(constants[j]));
  }
  const auto gradients = [&]() -> SvaGradients {
    return {grad_q,        grad_keys,  grad_values, result.grad_features, result.grad_absorbed, result.grad_constants,
            result.pooled, result.mass};
  };
  if (problem.sizes.queries() == 0) return gradients();
  if (!projects) torch::stable::zero_(grad_q);
  // As in the forward, with sum of a * da in place of lse.
  Tensor delta_of_keys = lse, delta_of_features = lse;
  if (projects && absorbs) {
    delta_of_keys = new_like(lse);
    delta_of_features = new_like(lse);
    launch_projected_backward(scope, problem, grad_out, lse, nullptr, nullptr, {}, {}, &delta_of_keys);
  }
  if (absorbs) {
    launch_absorbed_backward(scope, problem, result, floats(lse), projects ? floats(delta_of_keys) : nullptr,
                             projects ? data<float>(delta_of_features) : nullptr);
  }
  if (projects) {
    launch_projected_backward(scope, problem, grad_out, lse, absorbs ? floats(delta_of_features) : nullptr, &grad_q,
                              grad_keys, grad_values, nullptr);
  }
  return gradients();
}

}  // namespace

MMOE_CUDA(m) {
  m.impl("sva", TORCH_BOX(&sva_cuda));
  m.impl("sva_backward", TORCH_BOX(&sva_backward_cuda));
}

}  // namespace mmoe::sva
