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

  template <typename T>
  T get(Py_ssize_t i) {
    if constexpr (std::is_same_v<T, at::Tensor>)
      return tensor(i);
    else if constexpr (std::is_same_v<T, OptionalTensor>)
      return optional(i);
    else if constexpr (std::is_same_v<T, std::string_view>)
      return word(i);
    else
      return integer(i);
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

// The way from Python into one of call::, whose parameters say how its arguments are unpacked
template <auto kOperator>
struct Fast;

template <typename Result, typename... Parameters, Result (*kOperator)(Parameters...)>
struct Fast<kOperator> {
  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    Arguments args(values, count);
    const auto unpacked = [&]<size_t... kPlaces>(std::index_sequence<kPlaces...>) {
      return std::tuple<std::decay_t<Parameters>...>(args.get<std::decay_t<Parameters>>(kPlaces)...);
    }(std::index_sequence_for<Parameters...>());
    return run(args, [&] {
      if constexpr (!std::is_void_v<Result>) return std::apply(kOperator, unpacked);
      std::apply(kOperator, unpacked);
      return std::get<0>(unpacked);  // of an operator that writes over its first argument
    });
    END_HANDLE_TH_ERRORS
  }
};

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
#define IA3_FAST(name, function) \
  {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&function)), METH_FASTCALL, nullptr}
      IA3_FAST("activation_into", fast_activation_into),
      IA3_FAST("scaled_linear", Fast<call::scaled_linear>::call),
      IA3_FAST("gated_activation", Fast<call::gated_activation>::call),
      IA3_FAST("scaled_activation", Fast<call::scaled_activation>::call),
      IA3_FAST("gated_mlp", Fast<call::gated_mlp>::call),
      IA3_FAST("mlp", Fast<call::mlp>::call),
      IA3_FAST("scale_weight_", Fast<call::scale_weight_>::call),
      {nullptr, nullptr, 0, nullptr}};
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
