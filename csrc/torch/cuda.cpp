// The CUDA kernels on tensors. Arguments were checked against ia3_kernels/schemas.py by whoever calls; here they become
// raw pointers. A stream comes as the number that torch has for it, so that no header of CUDA is needed.
#include <ATen/DeviceGuard.h>

#include <array>

#include "../include/ia3_kernels.h"
#include "operators.h"
#include "python.h"

namespace py = pybind11;

namespace ia3 {
namespace {

static_assert(int(DType::kFloat16) == IA3_FLOAT16 && int(Activation::kIdentity) == IA3_IDENTITY,
              "csrc/core/arguments.h and csrc/include/ia3_kernels.h number types and activations alike");

ia3_dtype c_dtype(const at::Tensor& x) { return static_cast<ia3_dtype>(dtype_of(x)); }

ia3_stream c_stream(int64_t stream) { return reinterpret_cast<ia3_stream>(stream); }

// True where the kernel took the arguments, false where it leaves them to another one.
bool accepted(const char* op, ia3_status status) {
  TORCH_CHECK(status == IA3_OK || status == IA3_UNSUPPORTED, op, ": ", ia3_last_error());
  return status == IA3_OK;
}

void demand(const char* op, ia3_status status) { TORCH_CHECK(status == IA3_OK, op, ": ", ia3_last_error()); }

at::Tensor bytes_like(const at::Tensor& x, size_t bytes) {
  return at::empty({int64_t(bytes)}, x.options().dtype(at::kByte));
}

// A scale as the kernels read it, with the tensors that own its memory.
struct Scale {
  Scale(const OptionalTensor& given, const OptionalTensor& adapter_index) {
    if (!given) return;
    values = given->to(at::kFloat).contiguous();
    view.scale = values.const_data_ptr<float>();
    if (!adapter_index) return;
    index = adapter_index->contiguous();
    view.index = index.const_data_ptr<int32_t>();
    view.adapters = int32_t(values.size(0));
  }

  at::Tensor values, index;
  ia3_scale view{};
};

at::Tensor cuda_activation(const at::Tensor& gate, const OptionalTensor& up, const OptionalTensor& scale,
                           const std::string& name, const OptionalTensor& adapter_index, const OptionalTensor& out,
                           int64_t stream) {
  BelowAutograd below;
  const c10::DeviceGuard device(gate.device());
  const at::Tensor result = out ? *out : at::empty(gate.sizes(), gate.options());
  if (gate.numel() == 0) return result;
  const Rows g = rows_of(gate), u = up ? rows_of(*up) : Rows{}, h = rows_of(result);
  TORCH_CHECK(!h.owner.defined() || h.owner.is_alias_of(result), name,
              ": out has strides that no kernel writes; expected rows with adjacent elements.");
  const Scale s(scale, adapter_index);
  ia3_activation_args args{};
  args.dtype = c_dtype(gate);
  args.activation = static_cast<ia3_activation>(activation_of("gated_activation", name));
  args.rows = g.count;
  args.cols = g.cols;
  args.gate = g.data;
  args.gate_stride = g.stride;
  args.up = u.data;
  args.up_stride = u.stride;
  args.scale = s.view;
  args.out = const_cast<void*>(h.data);
  args.out_stride = h.stride;
  demand("gated_activation", ia3_cuda_activation(&args, c_stream(stream)));
  return result;
}

// `chunks`: the tensors of ia3_kernels.chunks.Chunks, in their order.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cuda_activation_backward(
    const at::Tensor& grad, const at::Tensor& gate, const OptionalTensor& up, const OptionalTensor& scale,
    const std::string& name, const std::optional<std::array<at::Tensor, 6>>& chunks, std::array<bool, 3> mask,
    int64_t stream) {
  BelowAutograd below;
  const c10::DeviceGuard device(gate.device());
  const auto like_gate = [&](bool wanted) {
    return wanted ? at::empty(gate.sizes(), gate.options()) : at::empty({0}, gate.options());
  };
  const at::Tensor grad_gate = like_gate(mask[0]), grad_up = like_gate(mask[1] && up);
  if (!scale || !mask[2]) mask[2] = false;
  const at::Tensor nothing = at::empty({0}, scale ? scale->options() : gate.options());
  if (gate.numel() == 0) return {grad_gate, grad_up, mask[2] ? at::zeros_like(*scale) : nothing};

  const Rows dh = rows_of(grad), g = rows_of(gate), u = up ? rows_of(*up) : Rows{};
  const Scale s(scale, std::nullopt);
  const at::Tensor sums = mask[2] ? at::empty(scale->sizes(), scale->options().dtype(at::kFloat)) : at::Tensor();
  ia3_chunks plan{};
  if (chunks) {
    plan.order = (*chunks)[0].const_data_ptr<int32_t>();
    plan.first = (*chunks)[1].const_data_ptr<int32_t>();
    plan.last = (*chunks)[2].const_data_ptr<int32_t>();
    plan.adapter = (*chunks)[3].const_data_ptr<int32_t>();
    plan.adapter_first = (*chunks)[4].const_data_ptr<int32_t>();
    plan.adapter_last = (*chunks)[5].const_data_ptr<int32_t>();
    plan.chunks = (*chunks)[1].numel();
  }
  ia3_activation_backward_args args{};
  args.dtype = c_dtype(gate);
  args.activation = static_cast<ia3_activation>(activation_of("gated_activation_backward", name));
  args.rows = g.count;
  args.cols = g.cols;
  args.grad = dh.data;
  args.grad_stride = dh.stride;
  args.gate = g.data;
  args.gate_stride = g.stride;
  args.up = u.data;
  args.up_stride = u.stride;
  args.scale = s.view;
  if (chunks) args.scale.adapters = int32_t(scale->size(0));
  args.chunks = chunks ? &plan : nullptr;
  args.grad_gate = mask[0] ? grad_gate.mutable_data_ptr() : nullptr;
  args.grad_up = grad_up.numel() > 0 ? grad_up.mutable_data_ptr() : nullptr;
  args.grad_scale = mask[2] ? sums.mutable_data_ptr<float>() : nullptr;
  const at::Tensor workspace = bytes_like(gate, ia3_cuda_activation_backward_workspace(&args));
  args.workspace = workspace.mutable_data_ptr();
  demand("gated_activation_backward", ia3_cuda_activation_backward(&args, c_stream(stream)));
  return {grad_gate, grad_up, mask[2] ? sums.to(scale->scalar_type()) : nothing};
}

void cuda_scale_weight_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim, int64_t stream) {
  BelowAutograd below;
  if (weight.numel() == 0) return;
  const bool by_rows = weight.stride(1) == 1 || weight.size(1) == 1;
  const at::Tensor stored = by_rows ? weight : weight.t();
  TORCH_CHECK(stored.stride(1) == 1 || stored.size(1) == 1, "scale_weight_: weight has strides ", weight.strides(),
              "; expected one of its dimensions to be dense.");
  const c10::DeviceGuard device(weight.device());
  const at::Tensor factors = scale.to(at::kFloat).contiguous();
  const float* s = factors.const_data_ptr<float>();
  const bool along_rows = (dim == 0) == by_rows;
  ia3_scale_weight_args args{};
  args.dtype = c_dtype(weight);
  args.rows = stored.size(0);
  args.cols = stored.size(1);
  args.weight = stored.mutable_data_ptr();
  args.weight_stride = stored.stride(0);
  args.row_scale = along_rows ? s : nullptr;
  args.col_scale = along_rows ? nullptr : s;
  demand("scale_weight_", ia3_cuda_scale_weight(&args, c_stream(stream)));
}

// What a linear layer writes, with the tensors that its raw arguments point into.
struct LinearOutput {
  LinearOutput(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& output_scale, const OptionalTensor& adapter_index)
      : scale(output_scale, adapter_index) {
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    y = at::empty(sizes, x.options());
    const bool transposed = weight.stride(1) != 1;
    view.out = weight.size(0);
    view.weight = weight.const_data_ptr();
    view.weight_stride = weight.stride(transposed ? 1 : 0);
    if (bias) {
      dense_bias = bias->contiguous();
      view.bias = dense_bias.const_data_ptr();
    }
    view.scale = scale.view;
    view.y = y.mutable_data_ptr();
    view.y_stride = weight.size(0);
  }

  at::Tensor y, dense_bias;
  Scale scale;
  ia3_linear_output view{};
};

bool is_transposed(const at::Tensor& weight) { return weight.stride(1) != 1 && weight.stride(0) == 1; }

// The outputs of one to IA3_SMALL_OUTPUTS layers of the same input; none where the kernel does not take them.
std::optional<std::vector<at::Tensor>> cuda_small_linear(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                                         const std::vector<OptionalTensor>& biases,
                                                         const OptionalTensor& input_scale,
                                                         const std::vector<OptionalTensor>& output_scales,
                                                         const OptionalTensor& adapter_index, int64_t stream) {
  BelowAutograd below;
  const size_t count = weights.size();
  TORCH_CHECK(count >= 1 && count <= IA3_SMALL_OUTPUTS && biases.size() == count && output_scales.size() == count,
              "small_linear: got ", count, " weights, ", biases.size(), " biases and ", output_scales.size(),
              " output scales; expected one to ", IA3_SMALL_OUTPUTS, " of each, None for those that are absent.");
  const Rows rows = rows_of(x);
  if (rows.count > IA3_SMALL_ROWS || x.numel() == 0) return std::nullopt;
  for (const at::Tensor& weight : weights) {
    const bool dense = weight.stride(1) == 1 || weight.stride(0) == 1;
    if (!dense || is_transposed(weight) != is_transposed(weights[0])) return std::nullopt;
  }
  const c10::DeviceGuard device(x.device());
  const Scale s_in(input_scale, input_scale ? adapter_index : std::nullopt);
  ia3_small_linear_args args{};
  args.dtype = c_dtype(x);
  args.rows = rows.count;
  args.in = rows.cols;
  args.x = rows.data;
  args.x_stride = rows.stride;
  args.input_scale = s_in.view;
  args.transposed = is_transposed(weights[0]);
  args.count = int(count);
  std::vector<LinearOutput> outputs;
  outputs.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    outputs.emplace_back(x, weights[i], biases[i], output_scales[i], output_scales[i] ? adapter_index : std::nullopt);
    args.outputs[i] = outputs.back().view;
  }
  const at::Tensor workspace = bytes_like(x, ia3_cuda_small_linear_workspace(&args));
  args.workspace = workspace.mutable_data_ptr();
  if (!accepted("small_linear", ia3_cuda_small_linear(&args, c_stream(stream)))) return std::nullopt;
  std::vector<at::Tensor> results;
  for (const LinearOutput& output : outputs) results.push_back(output.y);
  return results;
}

// None where the kernel does not take the arguments. `tile`: a name out of hopper_tiles(), or "auto".
OptionalTensor cuda_hopper_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& output_scale, const std::string& tile, int64_t stream) {
  BelowAutograd below;
  if (x.scalar_type() == at::kFloat || weight.stride(1) != 1 || x.numel() == 0 || weight.numel() == 0) {
    return std::nullopt;
  }
  const Rows rows = rows_of(x);
  const c10::DeviceGuard device(x.device());
  const LinearOutput output(x, weight, bias, output_scale, std::nullopt);
  ia3_hopper_linear_args args{};
  args.dtype = c_dtype(x);
  args.rows = rows.count;
  args.in = rows.cols;
  args.x = rows.data;
  args.x_stride = rows.stride;
  args.output = output.view;
  args.tile = -1;
  if (tile != "auto") {
    const char* const* names = ia3_cuda_hopper_tiles();
    for (int i = 0; names[i] != nullptr; ++i) {
      if (tile == names[i]) args.tile = i;
    }
    TORCH_CHECK(args.tile >= 0, "hopper_linear: there is no tile '", tile, "'; hopper_tiles() has their names.");
  }
  const at::Tensor workspace = bytes_like(x, ia3_cuda_hopper_linear_workspace(&args));
  args.workspace = workspace.mutable_data_ptr();
  if (!accepted("hopper_linear", ia3_cuda_hopper_linear(&args, c_stream(stream)))) return std::nullopt;
  return output.y;
}

template <typename T>
auto listed(const T* first) {
  std::vector<std::conditional_t<std::is_same_v<T, int>, int, std::string>> values;
  for (; *first; ++first) values.emplace_back(*first);
  return values;
}

}  // namespace

void bind_cuda(py::module_& module) {
  using py::arg;
  module.def("architectures", [] { return listed(ia3_cuda_architectures()); });
  module.def("sources", &ia3_cuda_sources);
  module.def("hopper_tiles", [] { return listed(ia3_cuda_hopper_tiles()); });
  module.def("activation", &cuda_activation, arg("gate"), arg("up"), arg("scale"), arg("activation"),
             arg("adapter_index"), arg("out"), arg("stream"));
  module.def("activation_backward", &cuda_activation_backward, arg("grad"), arg("gate"), arg("up"), arg("scale"),
             arg("activation"), arg("chunks"), arg("output_mask"), arg("stream"));
  module.def("scale_weight_", &cuda_scale_weight_, arg("weight"), arg("scale"), arg("dim"), arg("stream"));
  module.def("small_linear", &cuda_small_linear, arg("x"), arg("weights"), arg("biases"), arg("input_scale"),
             arg("output_scales"), arg("adapter_index"), arg("stream"));
  module.def("hopper_linear", &cuda_hopper_linear, arg("x"), arg("weight"), arg("bias"), arg("output_scale"),
             arg("tile"), arg("stream"));
}

}  // namespace ia3
