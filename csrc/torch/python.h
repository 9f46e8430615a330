// What every file that meets Python needs.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

namespace ia3 {

// Inside an operator nothing is differentiated or autocast: the dispatcher has done that, or had no need to.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// The submodule of the CUDA kernels.
void bind_cuda(pybind11::module_& module);

}  // namespace ia3
