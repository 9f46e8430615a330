// The Python module ia3_kernels._C: the operators as a backend, and `direct`, the short cut past the dispatcher.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include "../cpu/kernels.h"
#include "operators.h"
#include "python.h"

namespace py = pybind11;

namespace ia3 {
namespace {

at::Tensor backend_scaled_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                                 const OptionalTensor& adapter_index) {
  BelowAutograd guard;
  return scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index);
}

at::Tensor backend_gated_activation(const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& scale,
                                    const std::string& name, const OptionalTensor& adapter_index,
                                    const OptionalTensor& out) {
  BelowAutograd guard;
  return activation("gated_activation", gate, up, scale, name, adapter_index, out);
}

at::Tensor backend_scaled_activation(const at::Tensor& x, const OptionalTensor& scale, const std::string& name,
                                     const OptionalTensor& adapter_index, const OptionalTensor& out) {
  BelowAutograd guard;
  return activation("scaled_activation", x, std::nullopt, scale, name, adapter_index, out);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backend_gated_activation_backward(
    const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& scale,
    const std::string& name, const OptionalTensor& adapter_index, std::array<bool, 3> mask,
    const OptionalTensor& out_gate, const OptionalTensor& out_up) {
  BelowAutograd guard;
  return activation_backward("gated_activation", grad, gate, up, scale, name, adapter_index, mask, {out_gate, out_up});
}

std::tuple<at::Tensor, at::Tensor> backend_scaled_activation_backward(
    const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& scale, const std::string& name,
    const OptionalTensor& adapter_index, std::array<bool, 2> mask, const OptionalTensor& out) {
  BelowAutograd guard;
  const auto [grad_x, grad_up, grad_scale] =
      activation_backward("scaled_activation", grad, x, std::nullopt, scale, name, adapter_index,
                          {mask[0], false, mask[1]}, {out, std::nullopt});
  return {grad_x, grad_scale};
}

void backend_scale_weight_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  BelowAutograd guard;
  scale_weight_(weight, scale, dim);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backend_merge_exact_(const at::Tensor& weight, const at::Tensor& scale,
                                                                    int64_t dim) {
  BelowAutograd guard;
  return merge_exact_(weight, scale, dim);
}

void backend_unmerge_exact_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim, const at::Tensor& parity,
                            const at::Tensor& positions, const at::Tensor& bits) {
  BelowAutograd guard;
  unmerge_exact_(weight, scale, dim, parity, positions, bits);
}

at::Tensor backend_stays_finite(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  BelowAutograd guard;
  return stays_finite(weight, scale, dim);
}

std::tuple<at::Tensor, at::Tensor> backend_swap_exact_(const at::Tensor& weight, const at::Tensor& old_scale,
                                                       const at::Tensor& new_scale, int64_t dim,
                                                       const at::Tensor& parity, const at::Tensor& positions,
                                                       const at::Tensor& bits) {
  BelowAutograd guard;
  return swap_exact_(weight, old_scale, new_scale, dim, parity, positions, bits);
}

// --- the short cut ---

// The dispatch keys of a plain, dense CPU tensor with nothing switched on around it
const c10::DispatchKeySet kPlainKeys =
    c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) |
    c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) | c10::DispatchKeySet(c10::DispatchKey::BackendSelect);

// Whether every argument is None or a plain CPU tensor of a native dtype that asks for no gradient now, outside of any
// mode. Whatever else may come is the dispatcher's to sort out.
class Plain {
 public:
  Plain()
      : local_(c10::impl::tls_local_dispatch_key_set()),
        grad_(at::GradMode::is_enabled()),
        ok_(!at::impl::torch_function_mode_enabled()) {}

  const at::Tensor& tensor(py::handle object) {
    static const at::Tensor undefined;
    if (!ok_ || !THPVariable_CheckExact(object.ptr())) {
      ok_ = false;
      return undefined;
    }
    const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
    const auto keys = (tensor.key_set() | local_.included_) - local_.excluded_;
    // On the bits: subtracting key sets leaves the backend's bit standing.
    ok_ = (keys.raw_repr() & ~kPlainKeys.raw_repr()) == 0 && keys.has(c10::DispatchKey::CPU) &&
          !(grad_ && tensor.requires_grad());
    return tensor;
  }

  const at::Tensor& operand(py::handle object) {
    const at::Tensor& result = tensor(object);
    if (ok_) {
      const auto dtype = result.scalar_type();
      ok_ = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
    }
    return result;
  }

  OptionalTensor optional(py::handle object) {
    if (object.is_none()) return std::nullopt;
    const at::Tensor& result = tensor(object);
    return ok_ ? OptionalTensor(result) : std::nullopt;
  }

  bool ok() const { return ok_; }

 private:
  c10::impl::LocalDispatchKeySet local_;
  bool grad_;
  bool ok_;
};

py::object wrap(const at::Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); }

template <typename Function>
py::object run(Function function) {
  at::Tensor result;
  {
    BelowAutograd guard;
    result = function();
  }
  return wrap(result);
}

py::object direct_scaled_linear(py::handle x, py::handle weight, py::handle bias, py::handle input_scale,
                                py::handle output_scale, py::handle adapter_index) {
  Plain plain;
  const at::Tensor &a = plain.operand(x), &w = plain.tensor(weight);
  const OptionalTensor b = plain.optional(bias), s_in = plain.optional(input_scale),
                       s_out = plain.optional(output_scale), index = plain.optional(adapter_index);
  if (!plain.ok()) return py::none();
  return run([&] { return scaled_linear(a, w, b, s_in, s_out, index); });
}

py::object direct_gated_activation(py::handle gate, py::handle up, py::handle scale, const std::string& name,
                                   py::handle adapter_index) {
  Plain plain;
  const at::Tensor &g = plain.operand(gate), &u = plain.tensor(up);
  const OptionalTensor s = plain.optional(scale), index = plain.optional(adapter_index);
  if (!plain.ok()) return py::none();
  return run([&] { return activation("gated_activation", g, u, s, name, index); });
}

py::object direct_scaled_activation(py::handle x, py::handle scale, const std::string& name, py::handle adapter_index) {
  Plain plain;
  const at::Tensor& a = plain.operand(x);
  const OptionalTensor s = plain.optional(scale), index = plain.optional(adapter_index);
  if (!plain.ok()) return py::none();
  return run([&] { return activation("scaled_activation", a, std::nullopt, s, name, index); });
}

// Whether the weight was scaled; False where the dispatcher has work to do.
bool direct_scale_weight_(py::handle weight, py::handle scale, int64_t dim) {
  Plain plain;
  const at::Tensor &w = plain.operand(weight), &s = plain.tensor(scale);
  if (!plain.ok() || w.is_inference()) return false;
  BelowAutograd guard;
  scale_weight_(w, s, dim);
  w.unsafeGetTensorImpl()->bump_version();
  return true;
}

}  // namespace
}  // namespace ia3

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace ia3;
  using py::arg;
  m.doc() = "Native CPU kernels of ia3_kernels. Call them through ia3_kernels, which checks where they apply.";
  const py::none none;

  m.def("scaled_linear", &backend_scaled_linear, arg("x"), arg("weight"), arg("bias") = none, arg("input_scale") = none,
        arg("output_scale") = none, arg("adapter_index") = none);
  m.def("gated_activation", &backend_gated_activation, arg("gate"), arg("up"), arg("scale") = none,
        arg("activation") = "silu", arg("adapter_index") = none, arg("out") = none);
  m.def("scaled_activation", &backend_scaled_activation, arg("x"), arg("scale") = none, arg("activation") = "silu",
        arg("adapter_index") = none, arg("out") = none);
  m.def("scale_weight_", &backend_scale_weight_, arg("weight"), arg("scale"), arg("dim"));
  m.def("merge_exact_", &backend_merge_exact_, arg("weight"), arg("scale"), arg("dim"));
  m.def("unmerge_exact_", &backend_unmerge_exact_, arg("weight"), arg("scale"), arg("dim"), arg("parity"),
        arg("positions"), arg("bits"));
  m.def("stays_finite", &backend_stays_finite, arg("weight"), arg("scale"), arg("dim"));
  m.def("swap_exact_", &backend_swap_exact_, arg("weight"), arg("old_scale"), arg("new_scale"), arg("dim"),
        arg("parity"), arg("positions"), arg("bits"));
  m.def("gated_activation_backward", &backend_gated_activation_backward, arg("grad"), arg("gate"), arg("up"),
        arg("scale"), arg("activation"), arg("adapter_index"), arg("output_mask"), arg("out_gate") = none,
        arg("out_up") = none);
  m.def("scaled_activation_backward", &backend_scaled_activation_backward, arg("grad"), arg("x"), arg("scale"),
        arg("activation"), arg("adapter_index"), arg("output_mask"), arg("out") = none);

  m.def("isa", [] { return std::string(cpu::kernels().isa); });
  m.def("available_isas", &cpu::available_isas);
  m.def("matmul_route", &matmul_route);
  m.def("recovers_product", &recovers_product);

  auto direct = m.def_submodule("direct", "The forward operators past the dispatcher; None where it has work to do.");
  direct.def("scaled_linear", &direct_scaled_linear);
  direct.def("gated_activation", &direct_gated_activation);
  direct.def("scaled_activation", &direct_scaled_activation);
  direct.def("scale_weight_", &direct_scale_weight_);

#if defined(IA3_WITH_CUDA)
  auto cuda = m.def_submodule("cuda", "The CUDA kernels; ia3_kernels/backends/cuda.py checks what comes here.");
  bind_cuda(cuda);
#endif
}
