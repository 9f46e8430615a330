// The operators below autograd: arguments are checked, and their device's backend computes.
#include "operators.h"

#include <ATen/MemoryOverlap.h>

#include "backend.h"
#include "checks.h"
#include "python.h"

namespace ia3 {
namespace {

// Gives the gradient of a scale that came as [n, 1] or [1, n] its shape.
void shape_like(at::Tensor& gradient, const OptionalTensor& scale) {
  if (scale && scale->dim() != gradient.dim()) gradient = gradient.view(scale->sizes());
}

// Of two scales of which one alone is indexed, that one gets a pass of its own.
at::Tensor run_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                      const OptionalTensor& adapter_index, at::Tensor* product) {
  check_linear(x, weight, bias, input_scale, output_scale, adapter_index);
  const Backend& backend = backend_of("scaled_linear", x);
  const auto apply = [&](const at::Tensor& rows, const OptionalTensor& scale) {
    return backend.activation(rows, std::nullopt, scale, Activation::kIdentity, adapter_index, std::nullopt);
  };
  if (adapter_index && input_scale && output_scale && input_scale->dim() != output_scale->dim()) {
    if (input_scale->dim() == 2) {
      return backend.linear(apply(x, input_scale), weight, bias, std::nullopt, output_scale, std::nullopt, product);
    }
    const at::Tensor z = backend.linear(x, weight, bias, input_scale, std::nullopt, std::nullopt, nullptr);
    if (product != nullptr) *product = z;
    return apply(z, output_scale);
  }
  return backend.linear(x, weight, bias, as_vector(input_scale, adapter_index), as_vector(output_scale, adapter_index),
                        adapter_index, product);
}

at::Tensor scaled_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                         const OptionalTensor& adapter_index) {
  const BelowAutograd below;
  return run_linear(x, weight, bias, input_scale, output_scale, adapter_index, nullptr);
}

Tensor2 scaled_linear_product(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& input_scale, const at::Tensor& output_scale,
                              const OptionalTensor& adapter_index) {
  const BelowAutograd below;
  at::Tensor product;
  const at::Tensor y = run_linear(x, weight, bias, input_scale, output_scale, adapter_index, &product);
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
  // Those two do not look into strided memory: windows that share elements, and a scale that is a row of a slice.
  const bool by_rows = weight.stride(0) >= weight.stride(1);
  TORCH_CHECK(weight.numel() == 0 || weight.size(!by_rows) == 1 ||
                  weight.stride(!by_rows) > weight.stride(by_rows) * (weight.size(by_rows) - 1),
              "scale_weight_: rows of weight overlap in memory; copy it first.");
  const at::Tensor own = scale.is_alias_of(weight) ? scale.clone() : scale;
  backend_of("scale_weight_", weight).scale_weight_(weight, as_vector(own), dim);
}

}  // namespace

void register_operators(Registry& registry) {
  // One kernel for every device: the backend knows the device, so the dispatcher need not.
  torch::Library& kernels = registry[c10::DispatchKey::CompositeExplicitAutograd];
  kernels.impl("scaled_linear", scaled_linear);
  kernels.impl("scaled_linear_product", scaled_linear_product);
  kernels.impl("gated_activation", gated_activation);
  kernels.impl("gated_activation_backward", gated_activation_backward);
  kernels.impl("scaled_activation", scaled_activation);
  kernels.impl("scaled_activation_backward", scaled_activation_backward);
  kernels.impl("scale_pair", scale_pair);
  kernels.impl("scale_pair_backward", scale_pair_backward);
  kernels.impl("scale_weight_", scale_weight_);
}

}  // namespace ia3
