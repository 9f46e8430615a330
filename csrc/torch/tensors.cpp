#include "tensors.h"

#include <algorithm>
#include <array>

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

Activation activation_of(std::string_view op, std::string_view name) {
  static constexpr std::array<std::string_view, 6> kNames = {"silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"};
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK(found != kNames.end(), op, ": activation is '", name, "'; expected one of ", c10::Join(", ", kNames),
              ".");
  return static_cast<Activation>(found - kNames.begin());
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

void check_scale(std::string_view op, std::string_view name, const OptionalTensor& scale, int64_t size,
                 const at::Tensor& x, const OptionalTensor& adapter_index) {
  if (!scale) return;
  TORCH_CHECK(scale->is_floating_point(), op, ": ", name, " has dtype ", scale->scalar_type(),
              "; expected a floating-point dtype.");
  TORCH_CHECK(scale->device() == x.device(), op, ": ", name, " is on ", scale->device(), ", but the input is on ",
              x.device(), "; move one of them.");
  if (!adapter_index) {
    TORCH_CHECK(scale->dim() == 1 && scale->size(0) == size, op, ": ", name, " has shape ", scale->sizes(),
                "; expected [", size, "] (a two-dimensional scale also needs adapter_index).");
  } else {
    TORCH_CHECK(scale->dim() == 2 && scale->size(1) == size, op, ": ", name, " has shape ", scale->sizes(),
                "; expected [adapters, ", size, "] because adapter_index is given.");
  }
}

void check_index(std::string_view op, const OptionalTensor& adapter_index, const at::Tensor& x,
                 std::initializer_list<const OptionalTensor*> scales) {
  if (!adapter_index) return;
  int64_t adapters = -1;
  for (const OptionalTensor* scale : scales) {
    if (!*scale) continue;
    adapters = adapters < 0 ? (*scale)->size(0) : std::min(adapters, (*scale)->size(0));
  }
  TORCH_CHECK(adapters >= 0, op, ": adapter_index is given, but no scale to index.");
  TORCH_CHECK(adapter_index->scalar_type() == at::kInt, op, ": adapter_index has dtype ", adapter_index->scalar_type(),
              "; expected torch.int32.");
  TORCH_CHECK(adapter_index->sizes() == x.sizes().slice(0, x.dim() - 1), op, ": adapter_index has shape ",
              adapter_index->sizes(), "; expected the input's batch shape ", x.sizes().slice(0, x.dim() - 1), ".");
  TORCH_CHECK(adapter_index->device() == x.device(), op, ": adapter_index is on ", adapter_index->device(),
              ", but the input is on ", x.device(), "; move one of them.");
  const at::Tensor index = adapter_index->contiguous();
  const int32_t* values = index.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= -1 && values[i] < adapters, "adapter_index holds ", values[i],
                      "; expected -1 (no adapter) to ", adapters - 1, ", since the scale has ", adapters, " rows.");
  }
}

ScaleRows::ScaleRows(const OptionalTensor& given, const OptionalTensor& adapter_index, int64_t size,
                     bool ones_if_absent)
    : view{nullptr, nullptr, nullptr, size} {
  if (given) {
    // The tensor operators cost more than a decoding step's kernel: only call those that are needed.
    scale = given->scalar_type() == at::kFloat ? *given : given->to(at::kFloat);
    if (!scale.is_contiguous()) scale = scale.contiguous();
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

}  // namespace ia3
