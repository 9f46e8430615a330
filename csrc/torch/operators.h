// The operators on CPU tensors, below autograd. Shapes, semantics and errors: ia3_kernels/schemas.py.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <tuple>

#include "tensors.h"

namespace ia3 {

at::Tensor scaled_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                         const OptionalTensor& adapter_index);

// How a 16-bit matmul of many rows runs here, "library" or "widen": measured once per process, at first use, or named
// by the environment variable IA3_CPU_MATMUL.
std::string matmul_route(at::ScalarType dtype);

// Whether y = z s, as scaled_linear computes it, determines z as well as keeping z itself would.
bool recovers_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& output_scale);

// gated_activation (`up` given) and scaled_activation (`up` absent); `out`, if given, is written instead of a new
// tensor.
at::Tensor activation(std::string_view op, const at::Tensor& gate, const OptionalTensor& up,
                      const OptionalTensor& scale, std::string_view activation, const OptionalTensor& adapter_index,
                      const OptionalTensor& out = std::nullopt);

// Gradients of gate, up and scale; one that `mask` does not ask for is an empty tensor. `outputs`, if given, are
// written instead of new tensors for the first two.
std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_backward(
    std::string_view op, const at::Tensor& grad, const at::Tensor& gate, const OptionalTensor& up,
    const OptionalTensor& scale, std::string_view activation, const OptionalTensor& adapter_index,
    std::array<bool, 3> mask, const std::array<OptionalTensor, 2>& outputs = {});

void scale_weight_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim);

// The weight is a matrix as it lies in memory. Returns its parity, and the positions and bits of escapes.
std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_exact_(const at::Tensor& weight, const at::Tensor& scale,
                                                            int64_t dim);

void unmerge_exact_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim, const at::Tensor& parity,
                    const at::Tensor& positions, const at::Tensor& bits);

// Whether merging would give finite values only, as a tensor of one bool.
at::Tensor stays_finite(const at::Tensor& weight, const at::Tensor& scale, int64_t dim);

// Returns the positions and bits of the new escapes; the parity stays.
std::tuple<at::Tensor, at::Tensor> swap_exact_(const at::Tensor& weight, const at::Tensor& old_scale,
                                               const at::Tensor& new_scale, int64_t dim, const at::Tensor& parity,
                                               const at::Tensor& positions, const at::Tensor& bits);

}  // namespace ia3
