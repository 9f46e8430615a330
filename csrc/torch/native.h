// The operators on CPU tensors, of checked arguments and below autograd; backend.h describes them.
#pragma once

#include "backend.h"

namespace ia3 {

at::Tensor native_activation(const at::Tensor& gate, const OptionalTensor& up, const OptionalTensor& scale,
                             Activation activation, const OptionalTensor& adapter_index, const OptionalTensor& out);

Gradients native_activation_backward(const at::Tensor& grad, const at::Tensor& gate, const OptionalTensor& up,
                                     const OptionalTensor& scale, Activation activation,
                                     const OptionalTensor& adapter_index, std::array<bool, 3> mask);

at::Tensor native_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                         const OptionalTensor& adapter_index, at::Tensor* product);

std::tuple<at::Tensor, at::Tensor> native_scale_pair(const at::Tensor& x, const at::Tensor& first,
                                                     const at::Tensor& second);

Gradients native_scale_pair_backward(const at::Tensor& grad_first, const at::Tensor& grad_second, const at::Tensor& x,
                                     const at::Tensor& first, const at::Tensor& second, std::array<bool, 3> mask);

void native_scale_weight_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim);

}  // namespace ia3
