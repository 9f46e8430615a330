// The operators as the dispatcher knows them, to be called from C++. Schemas and equations: ia3_kernels/schemas.py.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <list>
#include <string_view>
#include <tuple>

#include "tensors.h"

namespace ia3 {

using Tensor2 = std::tuple<at::Tensor, at::Tensor>;
using Tensor3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

namespace call {

// Python defines the schemas, so an operator is looked up when it is first called.
#define IA3_OPERATOR(name, Result, parameters, arguments)                                             \
  inline Result name parameters {                                                                     \
    static const auto handle =                                                                        \
        c10::Dispatcher::singleton().findSchemaOrThrow("ia3::" #name, "").typed<Result parameters>(); \
    return handle.call arguments;                                                                     \
  }

IA3_OPERATOR(scaled_linear, at::Tensor,
             (const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& input_scale, const OptionalTensor& output_scale,
              const OptionalTensor& adapter_index),
             (x, weight, bias, input_scale, output_scale, adapter_index))
IA3_OPERATOR(scaled_linear_product, Tensor2,
             (const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& input_scale, const at::Tensor& output_scale, const OptionalTensor& adapter_index),
             (x, weight, bias, input_scale, output_scale, adapter_index))
IA3_OPERATOR(gated_activation, at::Tensor,
             (const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& scale, std::string_view activation,
              const OptionalTensor& adapter_index),
             (gate, up, scale, activation, adapter_index))
IA3_OPERATOR(gated_activation_backward, Tensor3,
             (const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& scale,
              std::string_view activation, const OptionalTensor& adapter_index, std::array<bool, 3> output_mask),
             (grad, gate, up, scale, activation, adapter_index, output_mask))
IA3_OPERATOR(scaled_activation, at::Tensor,
             (const at::Tensor& x, const OptionalTensor& scale, std::string_view activation,
              const OptionalTensor& adapter_index),
             (x, scale, activation, adapter_index))
IA3_OPERATOR(scaled_activation_backward, Tensor2,
             (const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& scale, std::string_view activation,
              const OptionalTensor& adapter_index, std::array<bool, 2> output_mask),
             (grad, x, scale, activation, adapter_index, output_mask))
IA3_OPERATOR(scale_pair, Tensor2, (const at::Tensor& x, const at::Tensor& first, const at::Tensor& second),
             (x, first, second))
IA3_OPERATOR(scale_pair_backward, Tensor3,
             (const at::Tensor& grad_first, const at::Tensor& grad_second, const at::Tensor& x, const at::Tensor& first,
              const at::Tensor& second, std::array<bool, 3> output_mask),
             (grad_first, grad_second, x, first, second, output_mask))
IA3_OPERATOR(scale_weight_, void, (const at::Tensor& weight, const at::Tensor& scale, int64_t dim),
             (weight, scale, dim))
IA3_OPERATOR(gated_mlp, at::Tensor,
             (const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
              const at::Tensor& down_weight, const OptionalTensor& scale, std::string_view activation,
              const OptionalTensor& gate_scale, const OptionalTensor& up_scale),
             (x, gate_weight, up_weight, down_weight, scale, activation, gate_scale, up_scale))
IA3_OPERATOR(mlp, at::Tensor,
             (const at::Tensor& x, const at::Tensor& up_weight, const at::Tensor& down_weight,
              const OptionalTensor& scale, std::string_view activation, const OptionalTensor& up_bias,
              const OptionalTensor& down_bias),
             (x, up_weight, down_weight, scale, activation, up_bias, down_bias))

#undef IA3_OPERATOR

}  // namespace call

// What the module registers when Python imports it. TORCH_LIBRARY_IMPL would do so while the library is loaded, where
// an exception (the schemas are those of other sources) ends the process.
class Registry {
 public:
  torch::Library& operator[](c10::DispatchKey key) {
    return libraries_.emplace_back(torch::Library::IMPL, "ia3", key, __FILE__, __LINE__);
  }

 private:
  std::list<torch::Library> libraries_;
};

void register_operators(Registry& registry);
void register_autograd(Registry& registry);
void register_blocks(Registry& registry);

}  // namespace ia3
