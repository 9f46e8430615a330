// The operators on CUDA tensors, through the library of csrc/cuda. That is a shared library of its own behind plain C
// (csrc/include/ia3_kernels.h), found when it is loaded: this file needs neither CUDA nor its headers, and the tests
// load kernels that run on the host in its place.
#include <ATen/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <array>

#include "../include/ia3_kernels.h"
#include "backend.h"
#include "checks.h"
#include "python.h"

namespace py = pybind11;

namespace ia3 {
namespace {

static_assert(int(DType::kFloat16) == IA3_FLOAT16 && int(Activation::kIdentity) == IA3_IDENTITY,
              "csrc/core/arguments.h and csrc/include/ia3_kernels.h number types and activations alike");

// The functions of the C interface by their names
struct Library {
#define IA3_FUNCTION(name) decltype(&::name) name = nullptr;
#define IA3_FUNCTIONS                                  \
  IA3_FUNCTION(ia3_last_error)                         \
  IA3_FUNCTION(ia3_cuda_architectures)                 \
  IA3_FUNCTION(ia3_cuda_sources)                       \
  IA3_FUNCTION(ia3_cuda_is_capturing)                  \
  IA3_FUNCTION(ia3_cuda_activation)                    \
  IA3_FUNCTION(ia3_cuda_activation_backward_workspace) \
  IA3_FUNCTION(ia3_cuda_activation_backward)           \
  IA3_FUNCTION(ia3_cuda_scale_pair)                    \
  IA3_FUNCTION(ia3_cuda_scale_pair_backward_workspace) \
  IA3_FUNCTION(ia3_cuda_scale_pair_backward)           \
  IA3_FUNCTION(ia3_cuda_scale_weight)                  \
  IA3_FUNCTION(ia3_cuda_exact_scale)                   \
  IA3_FUNCTION(ia3_cuda_hopper_tiles)                  \
  IA3_FUNCTION(ia3_cuda_hopper_linear)
  IA3_FUNCTIONS
#undef IA3_FUNCTION
};

Library library;

void load(const std::string& path) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(handle != nullptr, "ia3_kernels: ", path, " cannot be loaded: ", dlerror(), "; build the package again.");
  Library found;
#define IA3_FUNCTION(name)                                                     \
  found.name = reinterpret_cast<decltype(found.name)>(dlsym(handle, #name));   \
  TORCH_CHECK(found.name != nullptr, "ia3_kernels: ", path, " has no ", #name, \
              "; it is of another version: build again.");
  IA3_FUNCTIONS
#undef IA3_FUNCTION
  library = found;  // never closed: its kernels may be running
}

ia3_dtype c_dtype(const at::Tensor& x) { return static_cast<ia3_dtype>(dtype_of(x)); }

// The current device and stream become the tensor's. In the tests CPU tensors take this way too, and have neither.
class Launch {
 public:
  explicit Launch(const at::Tensor& x) : guard_(x.device()) {
    if (x.is_cuda()) stream_ = stream_of(c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(x.device()));
  }
  operator ia3_stream() const { return stream_; }

 private:
  template <typename Stream>
  static ia3_stream stream_of(const Stream& stream) {
    if (stream.id() == 0) return nullptr;  // a device's default stream, on every version of torch
    if constexpr (requires { stream.native_handle(); }) {
      return static_cast<ia3_stream>(stream.native_handle());
    } else {  // torch before it had that
      py::gil_scoped_acquire gil;
      const auto raw = py::module_::import("torch._C").attr("_cuda_getCurrentRawStream")(int(stream.device_index()));
      return reinterpret_cast<ia3_stream>(raw.template cast<uintptr_t>());
    }
  }

  c10::DeviceGuard guard_;
  ia3_stream stream_ = nullptr;
};

void demand(const char* op, ia3_status status) { TORCH_CHECK(status == IA3_OK, op, ": ", library.ia3_last_error()); }

at::Tensor bytes_like(const at::Tensor& x, size_t bytes) {
  return at::empty({int64_t(bytes)}, x.options().dtype(at::kByte));
}

// A scale as the kernels read it, with the tensors that own its memory.
struct Scale {
  Scale(const OptionalTensor& given, const OptionalTensor& adapter_index) {
    if (!given) return;
    values = as_factors(*given);
    view.scale = values.const_data_ptr<float>();
    if (!adapter_index) return;
    index = adapter_index->contiguous();
    view.index = index.const_data_ptr<int32_t>();
    view.adapters = int32_t(values.size(0));
  }

  at::Tensor values, index;
  ia3_scale view{};
};

at::Tensor activation(const at::Tensor& gate, const OptionalTensor& up, const OptionalTensor& scale,
                      Activation activation, const OptionalTensor& adapter_index, const OptionalTensor& out) {
  const at::Tensor result = out ? *out : at::empty(gate.sizes(), gate.options());
  if (gate.numel() == 0) return result;
  const Launch launch(gate);
  const Rows g = rows_of(gate), u = up ? rows_of(*up) : Rows{}, h = rows_of(result);
  const Scale s(scale, adapter_index);
  ia3_activation_args args{};
  args.dtype = c_dtype(gate);
  args.activation = static_cast<ia3_activation>(activation);
  args.rows = g.count;
  args.cols = g.cols;
  args.gate = g.data;
  args.gate_stride = g.stride;
  args.up = u.data;
  args.up_stride = u.stride;
  args.scale = s.view;
  args.out = const_cast<void*>(h.data);
  args.out_stride = h.stride;
  demand("gated_activation", library.ia3_cuda_activation(&args, launch));
  return result;
}

Gradients activation_backward(const at::Tensor& grad, const at::Tensor& gate, const OptionalTensor& up,
                              const OptionalTensor& scale, Activation activation, const OptionalTensor& adapter_index,
                              std::array<bool, 3> mask) {
  const auto like_gate = [&](bool wanted) {
    return wanted ? at::empty(gate.sizes(), gate.options()) : nothing_like(gate);
  };
  const at::Tensor grad_gate = like_gate(mask[0]), grad_up = up ? like_gate(mask[1]) : at::Tensor();
  const bool wants_scale = mask[2] && scale;
  if (gate.numel() == 0 && wants_scale) return {grad_gate, grad_up, at::zeros_like(*scale)};
  const at::Tensor sums =
      wants_scale ? at::empty(scale->sizes(), scale->options().dtype(at::kFloat)) : nothing_like(scale ? *scale : gate);
  if (gate.numel() == 0) return {grad_gate, grad_up, sums};

  const Launch launch(gate);
  const Rows dh = rows_of(grad), g = rows_of(gate), u = up ? rows_of(*up) : Rows{};
  const Scale s(scale, std::nullopt);
  ia3_activation_backward_args args{};
  args.dtype = c_dtype(gate);
  args.activation = static_cast<ia3_activation>(activation);
  args.rows = g.count;
  args.cols = g.cols;
  args.grad = dh.data;
  args.grad_stride = dh.stride;
  args.gate = g.data;
  args.gate_stride = g.stride;
  args.up = u.data;
  args.up_stride = u.stride;
  args.scale = s.view;
  std::array<at::Tensor, 6> pieces;
  ia3_chunks chunks{};
  if (adapter_index && scale) {
    args.scale.adapters = int32_t(scale->size(0));
    pieces = chunks_by_adapter(*adapter_index, scale->size(0), gate);
    chunks.order = pieces[0].const_data_ptr<int32_t>();
    chunks.first = pieces[1].const_data_ptr<int32_t>();
    chunks.last = pieces[2].const_data_ptr<int32_t>();
    chunks.adapter = pieces[3].const_data_ptr<int32_t>();
    chunks.adapter_first = pieces[4].const_data_ptr<int32_t>();
    chunks.adapter_last = pieces[5].const_data_ptr<int32_t>();
    chunks.chunks = pieces[1].numel();
    args.chunks = &chunks;
  }
  args.grad_gate = mask[0] ? grad_gate.mutable_data_ptr() : nullptr;
  args.grad_up = mask[1] && up ? grad_up.mutable_data_ptr() : nullptr;
  args.grad_scale = wants_scale ? sums.mutable_data_ptr<float>() : nullptr;
  const at::Tensor workspace = bytes_like(gate, library.ia3_cuda_activation_backward_workspace(&args));
  args.workspace = workspace.mutable_data_ptr();
  demand("gated_activation_backward", library.ia3_cuda_activation_backward(&args, launch));
  return {grad_gate, grad_up, wants_scale ? sums.to(scale->scalar_type()) : sums};
}

std::tuple<at::Tensor, at::Tensor> scale_pair(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second) {
  const at::Tensor a = at::empty(x.sizes(), x.options()), b = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return {a, b};
  const Launch launch(x);
  const Rows rows = rows_of(x);
  const at::Tensor s_a = as_factors(first), s_b = as_factors(second);
  ia3_scale_pair_args args{};
  args.dtype = c_dtype(x);
  args.rows = rows.count;
  args.cols = rows.cols;
  args.x = rows.data;
  args.x_stride = rows.stride;
  args.scales[0] = s_a.const_data_ptr<float>();
  args.scales[1] = s_b.const_data_ptr<float>();
  args.out[0] = a.mutable_data_ptr();
  args.out[1] = b.mutable_data_ptr();
  demand("scale_pair", library.ia3_cuda_scale_pair(&args, launch));
  return {a, b};
}

Gradients scale_pair_backward(const at::Tensor& grad_first, const at::Tensor& grad_second, const at::Tensor& x,
                              const at::Tensor& first, const at::Tensor& second, std::array<bool, 3> mask) {
  const at::Tensor grad_x = mask[0] ? at::empty(x.sizes(), x.options()) : nothing_like(x);
  const auto sums_like = [&](bool wanted, const at::Tensor& scale) {
    if (!wanted) return nothing_like(scale);
    const auto options = scale.options().dtype(at::kFloat);
    return x.numel() == 0 ? at::zeros(scale.sizes(), options) : at::empty(scale.sizes(), options);
  };
  const at::Tensor s_first = sums_like(mask[1], first), s_second = sums_like(mask[2], second);
  if (x.numel() > 0) {
    const Launch launch(x);
    const Rows da = rows_of(grad_first), db = rows_of(grad_second), rows = rows_of(x);
    const at::Tensor s_a = as_factors(first), s_b = as_factors(second);
    ia3_scale_pair_backward_args args{};
    args.dtype = c_dtype(x);
    args.rows = rows.count;
    args.cols = rows.cols;
    args.grads[0] = da.data;
    args.grads[1] = db.data;
    args.grad_strides[0] = da.stride;
    args.grad_strides[1] = db.stride;
    args.x = rows.data;
    args.x_stride = rows.stride;
    args.scales[0] = s_a.const_data_ptr<float>();
    args.scales[1] = s_b.const_data_ptr<float>();
    args.grad_x = mask[0] ? grad_x.mutable_data_ptr() : nullptr;
    args.grad_scales[0] = mask[1] ? s_first.mutable_data_ptr<float>() : nullptr;
    args.grad_scales[1] = mask[2] ? s_second.mutable_data_ptr<float>() : nullptr;
    const at::Tensor workspace = bytes_like(x, library.ia3_cuda_scale_pair_backward_workspace(&args));
    args.workspace = workspace.mutable_data_ptr();
    demand("scale_pair_backward", library.ia3_cuda_scale_pair_backward(&args, launch));
  }
  return {grad_x, mask[1] ? s_first.to(first.scalar_type()) : s_first,
          mask[2] ? s_second.to(second.scalar_type()) : s_second};
}

void scale_weight_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  if (weight.numel() == 0) return;
  const bool by_rows = weight.stride(1) == 1 || weight.size(1) == 1;
  const at::Tensor stored = by_rows ? weight : weight.t();
  if (stored.stride(1) != 1 && stored.size(1) != 1) {  // a strided slice, which no layer stores
    const at::Tensor copy = weight.contiguous();
    scale_weight_(copy, scale, dim);
    weight.copy_(copy);
    return;
  }
  const Launch launch(weight);
  const at::Tensor factors = as_factors(scale);
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
  demand("scale_weight_", library.ia3_cuda_scale_weight(&args, launch));
}

// One launch of exact merging; ia3_kernels/exact_gpu.py decides which. Absent tensors are null to the kernel.
void exact_scale(int mode, const at::Tensor& weight, const OptionalTensor& old_scale, const OptionalTensor& new_scale,
                 int64_t dim, const OptionalTensor& parity, const OptionalTensor& positions, const OptionalTensor& bits,
                 const OptionalTensor& workspace, const OptionalTensor& offsets, const OptionalTensor& new_positions,
                 const OptionalTensor& new_bits) {
  for (const OptionalTensor& given : {OptionalTensor(weight), old_scale, new_scale, parity, positions, bits}) {
    if (given) check_memory(*given);
  }
  if (weight.numel() == 0) return;
  const Launch launch(weight);
  const auto pointer = [](const OptionalTensor& tensor) {
    return tensor && tensor->numel() != 0 ? tensor->data_ptr() : nullptr;
  };
  const auto factors_of = [](const OptionalTensor& scale) { return scale ? as_factors(*scale) : at::Tensor(); };
  const at::Tensor old_factors = factors_of(old_scale), new_factors = factors_of(new_scale);
  ia3_exact_scale_args args{};
  args.dtype = c_dtype(weight);
  args.mode = static_cast<ia3_exact_mode>(mode);
  args.rows = weight.size(0);
  args.cols = weight.size(1);
  args.weight = weight.mutable_data_ptr();
  args.weight_stride = weight.stride(0);
  args.old_scale = old_scale ? old_factors.const_data_ptr<float>() : nullptr;
  args.new_scale = new_scale ? new_factors.const_data_ptr<float>() : nullptr;
  args.scales_rows = dim == 0;
  args.rows_per_group = dim == 0 ? args.rows : args.rows / (old_scale ? *old_scale : *new_scale).size(0);
  args.parity = static_cast<uint8_t*>(pointer(parity));
  args.positions = static_cast<const int64_t*>(pointer(positions));
  args.bits = pointer(bits);
  args.escapes = positions ? positions->numel() : 0;
  args.workspace = static_cast<int16_t*>(pointer(workspace));
  args.offsets = static_cast<const int64_t*>(pointer(offsets));
  args.new_positions = static_cast<int64_t*>(pointer(new_positions));
  args.new_bits = pointer(new_bits);
  demand("exact_scale", library.ia3_cuda_exact_scale(&args, launch));
}

// (x W^T + b) s on Hopper's tensor cores; undefined where the kernel does not take the arguments.
at::Tensor hopper_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& output_scale, int tile) {
  if (x.scalar_type() == at::kFloat || weight.stride(1) != 1 || x.numel() == 0 || weight.numel() == 0) return {};
  const Launch launch(x);
  const Rows rows = rows_of(x);
  const at::Tensor y = at::empty(output_shape(x, weight.size(0)), x.options());
  const at::Tensor dense_bias = bias ? bias->contiguous() : at::Tensor();
  const Scale scale(output_scale, std::nullopt);
  ia3_hopper_linear_args args{};
  args.dtype = c_dtype(x);
  args.rows = rows.count;
  args.in = rows.cols;
  args.x = rows.data;
  args.x_stride = rows.stride;
  args.out = weight.size(0);
  args.weight = weight.const_data_ptr();
  args.weight_stride = weight.stride(0);
  args.bias = bias ? dense_bias.const_data_ptr() : nullptr;
  args.scale = scale.view.scale;
  args.y = y.mutable_data_ptr();
  args.y_stride = weight.size(0);
  args.tile = tile;
  const ia3_status status = library.ia3_cuda_hopper_linear(&args, launch);
  if (status == IA3_UNSUPPORTED) return {};
  demand("scaled_linear", status);
  return y;
}

// The library's product, and a pass of 2 T N b bytes over it: in place, or from the product that somebody keeps. The
// product is rounded before it is scaled, as the eager formula does; the pass itself rounds once.
at::Tensor library_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& output_scale, const OptionalTensor& adapter_index,
                          at::Tensor* product) {
  const at::Tensor y = at::linear(x, weight, bias);
  if (product != nullptr) *product = y;
  if (!output_scale) return y;
  return activation(y, std::nullopt, output_scale, Activation::kIdentity, adapter_index,
                    product == nullptr ? OptionalTensor(y) : std::nullopt);
}

at::Tensor scaled_input(const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& adapter_index) {
  return scale ? activation(x, std::nullopt, scale, Activation::kIdentity, adapter_index, std::nullopt) : x;
}

bool is_capturing(const at::Tensor& x) { return library.ia3_cuda_is_capturing(Launch(x)) != 0; }

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                  const OptionalTensor& adapter_index, at::Tensor* product) {
  LinearRoute route{};
  if ((input_scale || output_scale) && product == nullptr) {
    route = linear_route(x, weight, bias, input_scale, output_scale, adapter_index, is_capturing);
  }
  if (route.route == Route::kTriton) {
    return linear_by_triton(x, weight, bias, input_scale, output_scale, adapter_index);
  }
  const at::Tensor rows = scaled_input(x, input_scale, adapter_index);
  if (route.route == Route::kCuda && !(adapter_index && output_scale)) {
    const at::Tensor y = hopper_linear(rows, weight, bias, output_scale, route.tile);
    if (y.defined()) return y;
  }
  return library_linear(rows, weight, bias, output_scale, adapter_index, product);
}

template <typename T>
auto listed(const T* first) {
  std::vector<std::conditional_t<std::is_same_v<T, int>, int, std::string>> values;
  for (; *first; ++first) values.emplace_back(*first);
  return values;
}

}  // namespace

const Backend kCudaBackend = {activation, activation_backward, linear, scale_pair, scale_pair_backward, scale_weight_};

void bind_cuda(py::module_& module) {
  module.def("load", &load, py::arg("path"), "Take the kernels of this library. Raises RuntimeError.");
  module.def("is_loaded", [] { return library.ia3_last_error != nullptr; });
  module.def("architectures", [] { return listed(library.ia3_cuda_architectures()); });
  module.def("sources", [] { return library.ia3_cuda_sources(); });
  module.def("hopper_tiles", [] { return listed(library.ia3_cuda_hopper_tiles()); });
  module.def("exact_scale", &exact_scale, py::call_guard<py::gil_scoped_release>(), py::arg("mode"), py::arg("weight"),
             py::arg("old_scale"), py::arg("new_scale"), py::arg("dim"), py::arg("parity") = py::none(),
             py::arg("positions") = py::none(), py::arg("bits") = py::none(), py::arg("workspace") = py::none(),
             py::arg("offsets") = py::none(), py::arg("new_positions") = py::none(), py::arg("new_bits") = py::none(),
             "One launch of exact merging: ia3_cuda_exact_scale of ia3_kernels.h.");
  module.def(
      "scaled_linear",
      [](const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& input_scale,
         const OptionalTensor& output_scale, int tile) -> OptionalTensor {
        const BelowAutograd below;
        const at::Tensor rows = scaled_input(x, input_scale, std::nullopt);
        if (tile < 0) return library_linear(rows, weight, std::nullopt, output_scale, std::nullopt, nullptr);
        const at::Tensor y = hopper_linear(rows, weight, std::nullopt, output_scale, tile);
        return y.defined() ? OptionalTensor(y) : std::nullopt;
      },
      py::arg("x"), py::arg("weight"), py::arg("input_scale"), py::arg("output_scale"), py::arg("tile"),
      "For measuring: by this tile of the Hopper matmul, or None where it declines; -1 for the library and a pass.");
}

}  // namespace ia3
