// What the nodes of autograd.cpp and mlp.cpp share.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

#include "tensors.h"

namespace ia3 {

// [*, n] as [rows, n]; also where n is 0, which leaves no row count to infer
inline at::Tensor flat(const at::Tensor& x) {
  return x.dim() == 2 ? x : x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2);
}

// None for an undefined tensor
OptionalTensor optional(const at::Tensor& tensor);

// The gradients of `op`; where they are to be differentiated again, such that doing it raises a sentence.
std::vector<at::Tensor> first_order(const char* op, std::vector<at::Tensor> gradients);

inline bool is_recorded(const at::Tensor& tensor) {
  TORCH_CHECK(!tensor._fw_grad(0).defined(),
              "ia3_kernels: forward-mode derivatives (jvp, jacfwd, dual numbers) are not implemented; differentiate ",
              "backward, or run the formula in plain torch where you need them.");
  return tensor.requires_grad() && at::GradMode::is_enabled();
}
inline bool is_recorded(const OptionalTensor& tensor) { return tensor && is_recorded(*tensor); }

inline bool is_recorded(std::string_view) { return false; }

// Whether a call on these tensors has to make a node. Each is asked, as each is refused with a tangent.
template <typename... Arguments>
bool any_recorded(const Arguments&... arguments) {
  return (int(is_recorded(arguments)) | ...) != 0;
}

// As for `linear`: the matmul's operands take autocast's dtype. Scales keep theirs; arithmetic on them is fp32.
class Autocast {
 public:
  explicit Autocast(c10::DeviceType device) : device_(device), dtype_(at::autocast::get_autocast_dtype(device)) {}

  at::Tensor operator()(const at::Tensor& tensor) const { return at::autocast::cached_cast(dtype_, tensor, device_); }
  OptionalTensor operator()(const OptionalTensor& tensor) const {
    return tensor ? OptionalTensor((*this)(*tensor)) : std::nullopt;
  }

 private:
  c10::DeviceType device_;
  at::ScalarType dtype_;
};

}  // namespace ia3
