// The operators below autograd: arguments are checked, and their device's backend computes.
#include "operators.h"

#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "python.h"

namespace ia3 {
namespace {

// Gives the gradient of a scale that came as [n, 1] or [1, n] its shape.
void shape_like(at::Tensor& gradient, const OptionalTensor& scale) {
  if (scale && scale->dim() != gradient.dim()) gradient = gradient.view(scale->sizes());
}

at::Tensor scaled_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                         const OptionalTensor& adapter_index) {
  const BelowAutograd below;
  check_linear(x, weight, bias, input_scale, output_scale, adapter_index);
  return backend_of("scaled_linear", x)
      .linear(x, weight, bias, as_vector(input_scale, adapter_index), as_vector(output_scale, adapter_index),
              adapter_index, nullptr);
}

Tensor2 scaled_linear_product(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& input_scale, const at::Tensor& output_scale,
                              const OptionalTensor& adapter_index) {
  const BelowAutograd below;
  check_linear(x, weight, bias, input_scale, output_scale, adapter_index);
  at::Tensor product;
  const at::Tensor y = backend_of("scaled_linear", x)
                           .linear(x, weight, bias, as_vector(input_scale, adapter_index),
                                   as_vector(OptionalTensor(output_scale), adapter_index), adapter_index, &product);
  return {y, product};
}

at::Tensor gated_activation(const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& scale,
                            std::string_view activation, const OptionalTensor& adapter_index) {
  const BelowAutograd below;
  const Activation kind = check_activation("gated_activation", gate, up, scale, activation, adapter_index);
  return backend_of("gated_activation", gate)
      .activation(gate, up, as_vector(scale, adapter_index), kind, adapter_index, std::nullopt);
}

at::Tensor scaled_activation(const at::Tensor& x, const OptionalTensor& scale, std::string_view activation,
                             const OptionalTensor& adapter_index) {
  const BelowAutograd below;
  const Activation kind = check_activation("scaled_activation", x, std::nullopt, scale, activation, adapter_index);
  return backend_of("scaled_activation", x)
      .activation(x, std::nullopt, as_vector(scale, adapter_index), kind, adapter_index, std::nullopt);
}

Tensor3 gated_activation_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up,
                                  const OptionalTensor& scale, std::string_view activation,
                                  const OptionalTensor& adapter_index, std::array<bool, 3> mask) {
  const BelowAutograd below;
  const Activation kind = check_activation("gated_activation", gate, up, scale, activation, adapter_index, grad);
  auto result = backend_of("gated_activation_backward", gate)
                    .activation_backward(grad, gate, up, as_vector(scale, adapter_index), kind, adapter_index, mask);
  if (mask[2]) shape_like(std::get<2>(result), scale);
  return result;
}

Tensor2 scaled_activation_backward(const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& scale,
                                   std::string_view activation, const OptionalTensor& adapter_index,
                                   std::array<bool, 2> mask) {
  const BelowAutograd below;
  const Activation kind =
      check_activation("scaled_activation", x, std::nullopt, scale, activation, adapter_index, grad);
  auto [grad_x, grad_up, grad_scale] = backend_of("scaled_activation_backward", x)
                                           .activation_backward(grad, x, std::nullopt, as_vector(scale, adapter_index),
                                                                kind, adapter_index, {mask[0], false, mask[1]});
  if (mask[1]) shape_like(grad_scale, scale);
  return {grad_x, grad_scale};
}

Tensor2 scale_pair(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second) {
  const BelowAutograd below;
  check_scale_pair(x, first, second);
  return backend_of("scale_pair", x).scale_pair(x, as_vector(first), as_vector(second));
}

Tensor3 scale_pair_backward(const at::Tensor& grad_first, const at::Tensor& grad_second, const at::Tensor& x,
                            const at::Tensor& first, const at::Tensor& second, std::array<bool, 3> mask) {
  const BelowAutograd below;
  check_scale_pair(x, first, second, {grad_first, grad_second});
  auto result = backend_of("scale_pair_backward", x)
                    .scale_pair_backward(grad_first, grad_second, x, as_vector(first), as_vector(second), mask);
  if (mask[1]) shape_like(std::get<1>(result), first);
  if (mask[2]) shape_like(std::get<2>(result), second);
  return result;
}

void scale_weight_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  const BelowAutograd below;
  check_scale_weight(weight, scale, dim);
  at::assert_no_internal_overlap(weight);
  at::assert_no_overlap(weight, scale);
  backend_of("scale_weight_", weight).scale_weight_(weight, as_vector(scale), dim);
}

}  // namespace

// One kernel for every device: the backend knows the device, so the dispatcher need not.
TORCH_LIBRARY_IMPL(ia3, CompositeExplicitAutograd, m) {
  m.impl("scaled_linear", scaled_linear);
  m.impl("scaled_linear_product", scaled_linear_product);
  m.impl("gated_activation", gated_activation);
  m.impl("gated_activation_backward", gated_activation_backward);
  m.impl("scaled_activation", scaled_activation);
  m.impl("scaled_activation_backward", scaled_activation_backward);
  m.impl("scale_pair", scale_pair);
  m.impl("scale_pair_backward", scale_pair_backward);
  m.impl("scale_weight_", scale_weight_);
}

}  // namespace ia3
