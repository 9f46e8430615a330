#include "../cpu/kernels.h"
#include "native.h"

namespace ia3 {

void native_scale_weight_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  const DType dtype = dtype_of(weight);
  if (weight.numel() == 0) return;
  const bool by_rows = weight.stride(1) == 1 || weight.size(1) == 1;
  if (!by_rows && weight.stride(0) == 1) return native_scale_weight_(weight.t(), scale, 1 - dim);
  if (!by_rows) {
    // Neither dimension is dense: a strided slice, which no layer stores.
    const at::Tensor copy = weight.contiguous();
    native_scale_weight_(copy, scale, dim);
    weight.copy_(copy);
    return;
  }
  const at::Tensor factors = as_factors(scale);
  const float* s = factors.const_data_ptr<float>();
  const auto& kernels = cpu::kernels();
  parallel(weight.size(0), weight.numel(), [&](int64_t begin, int64_t end) {
    kernels.scale_weight(dtype, weight.mutable_data_ptr(), weight.stride(0), weight.size(1), dim == 0 ? s : nullptr,
                         dim == 1 ? s : nullptr, begin, end);
  });
}

}  // namespace ia3
