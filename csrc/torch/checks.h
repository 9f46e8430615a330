// Whether the arguments of an operator fit together. Every call passes here once, whatever makes it and whatever runs
// it. The answer is C++; the sentence for a "no" is written once, in ia3_kernels/schemas.py, which also asks the same
// of traced shapes.
#pragma once

#include <string_view>

#include "tensors.h"

namespace ia3 {

// Raises unless a tensor is dense and its elements are somewhere in memory.
void check_memory(const at::Tensor& tensor);

void check_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                  const OptionalTensor& adapter_index);

// Returns the activation of that name. `grad`: the gradient of the result, in a backward pass.
Activation check_activation(std::string_view op, const at::Tensor& gate, const OptionalTensor& up,
                            const OptionalTensor& scale, std::string_view activation,
                            const OptionalTensor& adapter_index, const at::Tensor& grad = {});

// `grads`: of both results, in the backward pass
void check_scale_pair(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                      std::initializer_list<at::Tensor> grads = {});

void check_scale_weight(const at::Tensor& weight, const at::Tensor& scale, int64_t dim);

}  // namespace ia3
