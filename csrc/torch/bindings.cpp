// The Python module ia3_kernels._C: the operators' fast path from Python, and what ia3_kernels asks of the library.
#include <ATen/MemoryOverlap.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "../cpu/kernels.h"
#include "autograd.h"
#include "backend.h"
#include "checks.h"
#include "native.h"
#include "operators.h"
#include "python.h"

namespace py = pybind11;

namespace ia3 {

const Backend kNativeBackend = {native_activation, native_activation_backward, native_linear,
                                native_scale_pair, native_scale_pair_backward, native_scale_weight_};

namespace {

// --- the fast path ---
//
// The same operators as torch.ops.ia3's, called without its matching of arguments to a schema: positional tensors, None
// for those that are absent. What is not exactly a tensor or a parameter, and whatever a torch function mode has to
// see, is left to torch.ops: the answer is then None.

// The positional arguments of a call
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count)
      : values_(values), count_(count), plain_(!at::impl::torch_function_mode_enabled()) {}

  const at::Tensor& tensor(Py_ssize_t i) {
    static const at::Tensor undefined;
    if (i >= count_ || !THPVariable_CheckExact(values_[i])) {
      plain_ = false;
      return undefined;
    }
    return THPVariable_Unpack(values_[i]);
  }

  OptionalTensor optional(Py_ssize_t i) {
    if (i < count_ && values_[i] == Py_None) return std::nullopt;
    const at::Tensor& found = tensor(i);
    return found.defined() ? OptionalTensor(found) : std::nullopt;
  }

  std::string_view word(Py_ssize_t i) {
    Py_ssize_t size = 0;
    const char* const text =
        i < count_ && PyUnicode_Check(values_[i]) ? PyUnicode_AsUTF8AndSize(values_[i], &size) : nullptr;
    if (text == nullptr) {
      PyErr_Clear();  // of a word that is no UTF-8
      plain_ = false;
    }
    return text == nullptr ? std::string_view() : std::string_view(text, size_t(size));
  }

  int64_t integer(Py_ssize_t i) {
    if (i >= count_ || !PyLong_CheckExact(values_[i])) {
      plain_ = false;
      return 0;
    }
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(values_[i], &overflow);
    plain_ = plain_ && overflow == 0;
    return value;
  }

  bool plain() const { return plain_; }

  // Whether the dispatcher would come straight to a CPU's or GPU's kernel: nothing listens, and nothing is lazy
  bool reaches_kernels(std::initializer_list<const OptionalTensor> tensors) const {
    using c10::DispatchKey, c10::DispatchKeySet;
    static const DispatchKeySet plain =
        DispatchKeySet(DispatchKey::CPU) | DispatchKeySet(DispatchKey::CUDA) |
        DispatchKeySet(DispatchKey::AutogradCPU) | DispatchKeySet(DispatchKey::AutogradCUDA) |
        DispatchKeySet(DispatchKey::ADInplaceOrView) | DispatchKeySet(DispatchKey::BackendSelect);
    const auto local = c10::impl::tls_local_dispatch_key_set();
    for (const OptionalTensor& tensor : tensors) {
      if (!tensor) continue;
      // On the bits: subtracting key sets leaves the backend's bit standing.
      const auto keys = (tensor->key_set() | local.included_) - local.excluded_;
      if ((keys.raw_repr() & ~plain.raw_repr()) != 0) return false;
    }
    return true;
  }

 private:
  PyObject* const* values_;
  Py_ssize_t count_;
  bool plain_;
};

template <typename Function>
PyObject* run(const Arguments& arguments, Function function) {
  if (!arguments.plain()) Py_RETURN_NONE;
  at::Tensor result;
  {
    py::gil_scoped_release release;
    result = function();
  }
  return THPVariable_Wrap(std::move(result));
}

PyObject* fast_scaled_linear(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments args(values, count);
  const at::Tensor &x = args.tensor(0), &weight = args.tensor(1);
  const OptionalTensor bias = args.optional(2), input_scale = args.optional(3), output_scale = args.optional(4),
                       adapter_index = args.optional(5);
  return run(args, [&] { return call::scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index); });
  END_HANDLE_TH_ERRORS
}

PyObject* fast_gated_activation(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments args(values, count);
  const at::Tensor &gate = args.tensor(0), &up = args.tensor(1);
  const OptionalTensor scale = args.optional(2), adapter_index = args.optional(4);
  const std::string_view activation = args.word(3);
  return run(args, [&] { return call::gated_activation(gate, up, scale, activation, adapter_index); });
  END_HANDLE_TH_ERRORS
}

PyObject* fast_scaled_activation(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments args(values, count);
  const at::Tensor& x = args.tensor(0);
  const OptionalTensor scale = args.optional(1), adapter_index = args.optional(3);
  const std::string_view activation = args.word(2);
  return run(args, [&] { return call::scaled_activation(x, scale, activation, adapter_index); });
  END_HANDLE_TH_ERRORS
}

PyObject* fast_gated_mlp(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments args(values, count);
  const at::Tensor &x = args.tensor(0), &gate = args.tensor(1), &up = args.tensor(2), &down = args.tensor(3);
  const OptionalTensor scale = args.optional(4), gate_scale = args.optional(6), up_scale = args.optional(7);
  const std::string_view activation = args.word(5);
  return run(args, [&] { return call::gated_mlp(x, gate, up, down, scale, activation, gate_scale, up_scale); });
  END_HANDLE_TH_ERRORS
}

PyObject* fast_mlp(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments args(values, count);
  const at::Tensor &x = args.tensor(0), &up = args.tensor(1), &down = args.tensor(2);
  const OptionalTensor scale = args.optional(3), up_bias = args.optional(5), down_bias = args.optional(6);
  const std::string_view activation = args.word(4);
  return run(args, [&] { return call::mlp(x, up, down, scale, activation, up_bias, down_bias); });
  END_HANDLE_TH_ERRORS
}

PyObject* fast_scale_weight_(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments args(values, count);
  const at::Tensor &weight = args.tensor(0), &scale = args.tensor(1);
  const int64_t dim = args.integer(2);
  return run(args, [&] {
    call::scale_weight_(weight, scale, dim);
    return weight;
  });
  END_HANDLE_TH_ERRORS
}

// gated_activation or, with `up` None, scaled_activation into memory that the caller has; schemas.py has checked it.
PyObject* fast_activation_into(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments args(values, count);
  const at::Tensor &out = args.tensor(0), &gate = args.tensor(1);
  const OptionalTensor up = args.optional(2), scale = args.optional(3), adapter_index = args.optional(5);
  const std::string_view activation = args.word(4);
  if (!args.plain() || !args.reaches_kernels({out, gate, up, scale, adapter_index})) Py_RETURN_NONE;
  return run(args, [&] {
    const char* const op = up ? "gated_activation" : "scaled_activation";
    const BelowAutograd below;
    check_memory(out);
    const Activation kind = check_activation(op, gate, up, scale, activation, adapter_index);
    for (const OptionalTensor& given : {OptionalTensor(gate), up, scale}) {
      if (given) at::assert_no_partial_overlap(out, *given);
    }
    backend_of(op, gate).activation(gate, up, as_vector(scale, adapter_index), kind, adapter_index, out);
    torch::autograd::impl::bump_version(out);
    return out;
  });
  END_HANDLE_TH_ERRORS
}

PyMethodDef* fast_functions() {
  // Not a const table: Python keeps the addresses.
  static PyMethodDef functions[] = {
#define IA3_FAST(name) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fast_##name)), METH_FASTCALL, nullptr}
      IA3_FAST(activation_into), IA3_FAST(scaled_linear), IA3_FAST(gated_activation), IA3_FAST(scaled_activation),
      IA3_FAST(gated_mlp),       IA3_FAST(mlp),           IA3_FAST(scale_weight_),    {nullptr, nullptr, 0, nullptr}};
#undef IA3_FAST
  return functions;
}

// --- the rest ---

// A function of backend.h that runs without the GIL, as it runs below autograd
template <typename Result, typename... Args>
auto below_autograd(Result (*function)(Args...)) {
  return [function](Args... args) {
    const py::gil_scoped_release release;
    const BelowAutograd below;
    return function(args...);
  };
}

}  // namespace
}  // namespace ia3

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace ia3;
  m.doc() = "Compiled kernels of ia3_kernels, registered as torch.ops.ia3. Call them through ia3_kernels.";

  try {
    auto registry = std::make_unique<Registry>();
    register_operators(*registry);
    register_autograd(*registry);
    register_blocks(*registry);
    registry.release();  // for good
  } catch (const c10::Error& error) {
    throw py::import_error(std::string("it was built from other sources than the Python files beside it, so build the "
                                       "package again: ") +
                           error.what_without_backtrace());
  }

  auto fast = m.def_submodule("fast", "The operators without torch.ops' overhead; None for what torch.ops has to do.");
  if (PyModule_AddFunctions(fast.ptr(), fast_functions()) != 0) throw py::error_already_set();

  m.def("merge_exact_", below_autograd(&merge_exact_));
  m.def("unmerge_exact_", below_autograd(&unmerge_exact_));
  m.def("stays_finite", below_autograd(&stays_finite));
  m.def("swap_exact_", below_autograd(&swap_exact_));

  m.def("isa", [] { return std::string(cpu::kernels().isa); });
  m.def("available_isas", &cpu::available_isas);
  m.def("matmul_route", &matmul_route);
  m.def("forget_choices", &forget_choices);

  auto cuda = m.def_submodule("cuda", "The library of CUDA kernels, where one is loaded.");
  bind_cuda(cuda);
}
