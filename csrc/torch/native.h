// The operators on CPU tensors, of checked arguments and below autograd; backend.h describes them.
#pragma once

#include "backend.h"

namespace ia3 {

std::remove_pointer_t<decltype(Backend::activation)> native_activation;
std::remove_pointer_t<decltype(Backend::activation_backward)> native_activation_backward;
std::remove_pointer_t<decltype(Backend::linear)> native_linear;
std::remove_pointer_t<decltype(Backend::scale_pair)> native_scale_pair;
std::remove_pointer_t<decltype(Backend::scale_pair_backward)> native_scale_pair_backward;
std::remove_pointer_t<decltype(Backend::scale_weight_)> native_scale_weight_;

}  // namespace ia3
