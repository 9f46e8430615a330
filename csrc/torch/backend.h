// What computes an operator's arguments once they are checked: a device's kernels here, or ia3_kernels' Python ones.
#pragma once

#include <array>
#include <tuple>

#include "tensors.h"

namespace ia3 {

// Of gate (or x), up and scale; one that is not asked for is an empty tensor.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Functions below autograd, of checked arguments. Equations, shapes: ia3_kernels/schemas.py.
struct Backend {
  // gated_activation (`up` given) and scaled_activation (`up` absent), into `out` where it is given
  at::Tensor (*activation)(const at::Tensor& gate, const OptionalTensor& up, const OptionalTensor& scale,
                           Activation activation, const OptionalTensor& adapter_index, const OptionalTensor& out);

  // likewise; without `up` its gradient is undefined
  Gradients (*activation_backward)(const at::Tensor& grad, const at::Tensor& gate, const OptionalTensor& up,
                                   const OptionalTensor& scale, Activation activation,
                                   const OptionalTensor& adapter_index, std::array<bool, 3> mask);

  // scaled_linear; where `product` is not null, it becomes the product before output_scale
  at::Tensor (*linear)(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                       const OptionalTensor& adapter_index, at::Tensor* product);

  std::tuple<at::Tensor, at::Tensor> (*scale_pair)(const at::Tensor& x, const at::Tensor& first,
                                                   const at::Tensor& second);

  Gradients (*scale_pair_backward)(const at::Tensor& grad_first, const at::Tensor& grad_second, const at::Tensor& x,
                                   const at::Tensor& first, const at::Tensor& second, std::array<bool, 3> mask);

  void (*scale_weight_)(const at::Tensor& weight, const at::Tensor& scale, int64_t dim);
};

extern const Backend kNativeBackend;  // linear.cpp, activation.cpp, scale.cpp: CPU tensors
extern const Backend kCudaBackend;    // cuda.cpp
extern const Backend kPythonBackend;  // python_backend.cpp: Triton, the reference

// What runs an operator on x's device and dtype. ia3_kernels.backends.choose decides, once for each; its errors come
// through. The answers hold until they are forgotten, as when IA3_BACKEND has changed.
const Backend& backend_of(const char* op, const at::Tensor& x);
void forget_choices();

// How a GPU computes a product; chosen in Python, once for each kind of call, and kept likewise. Triton's launches cost
// the host more than they save the GPU where a product is small: those routes are taken inside of CUDA graphs only.
enum class Route { kLibrary, kTriton, kCuda };
struct LinearRoute {
  Route route;
  int tile;  // of kCuda
};
LinearRoute linear_route(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                         const OptionalTensor& adapter_index, bool (*is_capturing)(const at::Tensor& x));

// Calls ia3_kernels.backends.<function>; in python_backend.cpp, like the choices.
at::Tensor linear_by_triton(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                            const OptionalTensor& adapter_index);
std::array<at::Tensor, 6> chunks_by_adapter(const at::Tensor& adapter_index, int64_t adapters, const at::Tensor& gate);

// How a 16-bit matmul of many rows runs on this processor, "library" or "widen".
std::string matmul_route(at::ScalarType dtype);

// --- merging that can be undone, on CPU tensors ---

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
