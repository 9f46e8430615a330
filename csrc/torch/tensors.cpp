#include "tensors.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ia3 {

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK(false, "ia3: the native kernels got dtype ", tensor.scalar_type(),
                  "; expected float32, bfloat16 or float16.");
  }
}

Rows rows_of(const at::Tensor& x) {
  const int64_t n = x.size(-1);
  if (x.is_contiguous()) return {x.const_data_ptr(), x.numel() / std::max<int64_t>(n, 1), n, n, {}};
  at::Tensor rows = x.dim() == 2 ? x : x.reshape({x.numel() / std::max<int64_t>(n, 1), n});
  if (rows.stride(1) != 1 && n != 1) rows = rows.contiguous();
  return {rows.const_data_ptr(), rows.size(0), n, rows.stride(0), rows};
}

at::Tensor empty_output(at::IntArrayRef sizes, const at::Tensor& x) {
  at::Tensor tensor = at::detail::empty_cpu(sizes, x.scalar_type());
#if defined(__linux__)
  // The C library maps blocks of this size afresh each time, and unmaps them when freed.
  constexpr int64_t kAlwaysMapped = int64_t(32) << 20;
  constexpr uintptr_t kPage = 4096;
  if (const int64_t bytes = int64_t(tensor.nbytes()); bytes >= kAlwaysMapped) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + uintptr_t(bytes)) & ~(kPage - 1);
    // A hint: where it is refused, nothing changes.
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

at::DimVector output_shape(const at::Tensor& x, int64_t features) {
  at::DimVector shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.push_back(features);
  return shape;
}

at::Tensor as_factors(const at::Tensor& scale) {
  // The tensor operators cost more than a decoding step's kernel: only those that are needed are called.
  at::Tensor factors = scale.scalar_type() == at::kFloat ? scale : scale.to(at::kFloat);
  return factors.is_contiguous() ? factors : factors.contiguous();
}

ScaleRows::ScaleRows(const OptionalTensor& given, const OptionalTensor& adapter_index, int64_t size,
                     bool ones_if_absent)
    : view{nullptr, nullptr, nullptr, size} {
  if (given) {
    scale = as_factors(*given);
    if (adapter_index) {
      index = adapter_index->contiguous();
      ones = at::ones({size}, at::kFloat);
      view.index = index.const_data_ptr<int32_t>();
      view.ones = ones.const_data_ptr<float>();
    }
  } else if (ones_if_absent) {
    scale = at::ones({size}, at::kFloat);
  } else {
    return;
  }
  view.scale = scale.const_data_ptr<float>();
}

Crowding& Crowding::here() {
  static thread_local Crowding crowding;
  return crowding;
}

void Crowding::learn(int64_t elements, int threads, Clock::time_point begin, Clock::time_point own,
                     Clock::time_point end) {
  constexpr int kPatience = 16;  // a wait costs a sixteenth of the time that it buys
  const auto share = own - begin, wait = end - own;
  if (wait <= share * (threads - 1)) return;
  until_ = end + kPatience * wait;
  // What takes one thread as long as this region took
  small_ =
      int64_t(double(elements) * double((end - begin).count()) / double(std::max<int64_t>(1, share.count()) * threads));
}

}  // namespace ia3
