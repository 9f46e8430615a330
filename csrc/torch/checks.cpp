#include "checks.h"

#include <algorithm>
#include <array>
#include <limits>

#include "python.h"

namespace py = pybind11;

namespace ia3 {
namespace {

constexpr const char* kNoMemory =
    "ia3_kernels: a tensor has no memory of its own, being sparse or because its storage was freed; expected dense "
    "tensors.";

// Raises what the function of that name in schemas.py has to say of these arguments.
template <typename... Args>
[[noreturn]] void refuse(const char* function, const Args&... args) {
  py::gil_scoped_acquire gil;
  py::module_::import("ia3_kernels.schemas").attr(function)(args...);
  TORCH_CHECK(false, kNoMemory);
}

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

// Whether the elements are somewhere in memory: what is sparse, or was freed, has none.
bool is_dense(const at::Tensor& x) {
  return x.defined() && x.layout() == at::kStrided && x.has_storage() &&
         (x.numel() == 0 || x.storage().data() != nullptr);
}

bool is_float(const at::Tensor& x) {
  if (!is_dense(x)) return false;
  const auto type = x.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

bool is_like(const at::Tensor& tensor, const at::Tensor& x) {
  return is_dense(tensor) && tensor.scalar_type() == x.scalar_type() && tensor.device() == x.device();
}

bool is_scale(const OptionalTensor& scale, int64_t size, const at::Tensor& x, bool has_index) {
  if (!scale) return true;
  if (!is_dense(*scale) || !scale->is_floating_point() || scale->device() != x.device()) return false;
  if (scale->dim() == 1) return scale->size(0) == size;
  if (has_index) return scale->dim() == 2 && scale->size(1) == size;
  return scale->dim() == 2 && scale->numel() == size && (scale->size(0) == 1 || scale->size(1) == 1) &&
         scale->is_contiguous();
}

// `adapters`: rows of the scales that it is for, of which there has to be one
bool is_index(const OptionalTensor& index, const at::Tensor& x, int64_t adapters) {
  return !index || (is_dense(*index) && index->scalar_type() == at::kInt && index->device() == x.device() &&
                    index->sizes() == x.sizes().slice(0, x.dim() - 1) && adapters != kNone);
}

int64_t adapters_of(const OptionalTensor& scale) { return scale && scale->dim() == 2 ? scale->size(0) : kNone; }

// Bounds are read where that costs no synchronization; a GPU's kernels read nothing outside of them, and give NaN.
void check_bounds(const OptionalTensor& given, int64_t adapters) {
  if (!given || !given->is_cpu()) return;
  const at::Tensor index = given->contiguous();
  const int32_t* values = index.const_data_ptr<int32_t>();
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < index.numel(); ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  if (low < -1 || high >= adapters) refuse("check_bounds", *given, adapters);
}

}  // namespace

void check_memory(const at::Tensor& tensor) { TORCH_CHECK(is_dense(tensor), kNoMemory); }

void check_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                  const OptionalTensor& adapter_index) {
  const int64_t adapters = std::min(adapters_of(input_scale), adapters_of(output_scale));
  const bool fits =
      is_float(x) && is_like(weight, x) && weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1) &&
      (!bias || (is_like(*bias, x) && bias->dim() == 1 && bias->size(0) == weight.size(0))) &&
      is_scale(input_scale, weight.size(1), x, adapter_index.has_value()) &&
      is_scale(output_scale, weight.size(0), x, adapter_index.has_value()) && is_index(adapter_index, x, adapters);
  if (!fits) refuse("check_scaled_linear", x, weight, bias, input_scale, output_scale, adapter_index);
  check_bounds(adapter_index, adapters);
}

Activation check_activation(std::string_view op, const at::Tensor& gate, const OptionalTensor& up,
                            const OptionalTensor& scale, std::string_view activation,
                            const OptionalTensor& adapter_index, const at::Tensor& grad) {
  const auto kind = std::find(kActivationNames.begin(), kActivationNames.end(), activation);
  const bool fits = is_float(gate) && gate.dim() >= 1 && kind != kActivationNames.end() &&
                    (!up || (is_like(*up, gate) && up->sizes() == gate.sizes())) &&
                    is_scale(scale, gate.size(-1), gate, adapter_index.has_value()) &&
                    is_index(adapter_index, gate, adapters_of(scale));
  if (!fits) refuse("check_activation", std::string(op), gate, up, scale, std::string(activation), adapter_index);
  if (grad.defined() && !(is_like(grad, gate) && grad.sizes() == gate.sizes())) {
    refuse("check_gradient", std::string(op), grad, gate);
  }
  check_bounds(adapter_index, adapters_of(scale));
  return static_cast<Activation>(kind - kActivationNames.begin());
}

void check_scale_pair(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                      std::initializer_list<at::Tensor> grads) {
  const bool fits =
      is_float(x) && x.dim() >= 1 && is_scale(first, x.size(-1), x, false) && is_scale(second, x.size(-1), x, false);
  if (!fits) refuse("check_scale_pair", x, first, second);
  for (const at::Tensor& grad : grads) {
    if (!is_like(grad, x) || grad.sizes() != x.sizes()) refuse("check_gradient", "scale_pair", grad, x);
  }
}

void check_scale_weight(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  const bool fits = is_float(weight) && weight.dim() == 2 && (dim == 0 || dim == 1) &&
                    is_scale(scale, weight.size(dim), weight, false);
  if (!fits) refuse("check_scale_weight_", weight, scale, dim);
}

}  // namespace ia3
