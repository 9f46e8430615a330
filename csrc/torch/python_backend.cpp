// What Python decides and computes: which backend runs what, and the operators of those that are written in Python. It
// is asked once for each device, dtype and shape of a matmul; a backend in Python, at each call.
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "backend.h"
#include "python.h"

namespace py = pybind11;

namespace ia3 {
namespace {

// A function of ia3_kernels.backends. Hold the GIL.
py::object function(const char* name) { return py::module_::import("ia3_kernels.backends").attr(name); }

// Calls an operator of the Python backend that was chosen for the tensor's device and dtype.
template <typename Result, typename... Args>
Result run(const char* op, const at::Tensor& first, const Args&... args) {
  py::gil_scoped_acquire gil;
  return function("run")(op, first, args...).template cast<Result>();
}

at::Tensor activation(const at::Tensor& gate, const OptionalTensor& up, const OptionalTensor& scale,
                      Activation activation, const OptionalTensor& index, const OptionalTensor& out) {
  const std::string_view name = kActivationNames[size_t(activation)];
  const at::Tensor h = up ? run<at::Tensor>("gated_activation", gate, *up, scale, name, index)
                          : run<at::Tensor>("scaled_activation", gate, scale, name, index);
  return out ? out->copy_(h) : h;
}

Gradients activation_backward(const at::Tensor& grad, const at::Tensor& gate, const OptionalTensor& up,
                              const OptionalTensor& scale, Activation activation, const OptionalTensor& index,
                              std::array<bool, 3> mask) {
  const std::string_view name = kActivationNames[size_t(activation)];
  if (up) return run<Gradients>("gated_activation_backward", grad, gate, *up, scale, name, index, mask);
  auto [grad_x, grad_scale] = run<std::tuple<at::Tensor, at::Tensor>>(
      "scaled_activation_backward", grad, gate, scale, name, index, std::array<bool, 2>{mask[0], mask[2]});
  return {grad_x, at::Tensor(), grad_scale};
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& input_scale, const OptionalTensor& output_scale, const OptionalTensor& index,
                  at::Tensor* product) {
  if (product == nullptr) return run<at::Tensor>("scaled_linear", x, weight, bias, input_scale, output_scale, index);
  *product =
      run<at::Tensor>("scaled_linear", x, weight, bias, input_scale, std::nullopt, input_scale ? index : std::nullopt);
  return activation(*product, std::nullopt, output_scale, Activation::kIdentity, index, std::nullopt);
}

std::tuple<at::Tensor, at::Tensor> scale_pair(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second) {
  return run<std::tuple<at::Tensor, at::Tensor>>("scale_pair", x, first, second);
}

Gradients scale_pair_backward(const at::Tensor& grad_first, const at::Tensor& grad_second, const at::Tensor& x,
                              const at::Tensor& first, const at::Tensor& second, std::array<bool, 3> mask) {
  return run<Gradients>("scale_pair_backward", grad_first, grad_second, x, first, second, mask);
}

void scale_weight_(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  run<void>("scale_weight_", weight, scale, dim);
}

// --- choices ---

// By device type and dtype; null where nobody has asked yet
std::array<std::array<std::atomic<const Backend*>, size_t(at::ScalarType::NumOptions)>, 2> backends{};

std::atomic<const Backend*>* place_of(const at::Tensor& x) {
  const auto type = x.device().type();
  if (type != c10::kCPU && type != c10::kCUDA) return nullptr;
  return &backends[type == c10::kCUDA][size_t(x.scalar_type())];
}

// What a route depends on, and the program that Triton would compile for it: which tensors there are, of which types,
// and which addresses and strides are multiples of 16.
struct LinearKey {
  int64_t device, rows, out, in, adapters, kind;
  bool operator==(const LinearKey&) const = default;
};

struct LinearKeyHash {
  size_t operator()(const LinearKey& key) const {
    size_t hash = size_t(key.kind);
    for (const int64_t value : {key.device, key.rows, key.out, key.in, key.adapters}) {
      hash = hash * 0x9E3779B97F4A7C15 + size_t(value);
    }
    return hash;
  }
};

// Up to 16 each number of rows is a program of its own. More are rounded up to three leading bits, as by
// ia3_kernels.routes.counted, so that lengths that change from step to step share what is known.
int64_t counted(int64_t rows) {
  if (rows <= 16) return rows;
  int64_t unit = 1;
  while (rows / unit >= 8) unit *= 2;
  return (rows + unit - 1) / unit * unit;
}

LinearKey key_of(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                 const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                 const OptionalTensor& adapter_index) {
  int64_t kind = 2 * int(x.scalar_type()) + (weight.stride(1) != 1);
  const auto note = [&](uintptr_t place) { kind = 2 * kind + (place % 16 == 0); };
  for (const at::Tensor* matrix : {&x, &weight}) {
    note(uintptr_t(matrix->const_data_ptr()));
    uintptr_t strides = 0;
    for (const int64_t stride : matrix->strides()) strides |= stride == 1 ? 0 : uintptr_t(stride);
    note(strides);
  }
  for (const OptionalTensor* given : {&bias, &input_scale, &output_scale, &adapter_index}) {
    kind = 64 * kind + (*given ? int((*given)->scalar_type()) + 1 : 0);
    if (*given) note(uintptr_t((*given)->const_data_ptr()));
  }
  const OptionalTensor& scale = output_scale ? output_scale : input_scale;
  return {x.device().index(),
          counted(x.numel() / std::max<int64_t>(1, x.size(-1))),
          weight.size(0),
          weight.size(1),
          adapter_index ? scale->size(0) : 0,
          kind};
}

struct Routes {
  Route eager, captured;
  int tile;
};

std::shared_mutex routes_mutex;
std::unordered_map<LinearKey, Routes, LinearKeyHash> known_routes;

Route route_of(const std::string& name) {
  return name == "triton" ? Route::kTriton : name == "cuda" ? Route::kCuda : Route::kLibrary;
}

}  // namespace

const Backend& backend_of(const char* op, const at::Tensor& x) {
  std::atomic<const Backend*>* const place = place_of(x);
  if (place != nullptr) {
    if (const Backend* known = place->load(std::memory_order_acquire)) return *known;
  }
  const Backend* chosen = &kPythonBackend;
  {
    py::gil_scoped_acquire gil;
    const auto dtype = py::reinterpret_borrow<py::object>(py::cast(x).attr("dtype"));
    const std::string device = c10::DeviceTypeName(x.device().type(), true);
    const std::string name = function("choose")(op, device, dtype)[py::int_(0)].attr("name").cast<std::string>();
    if (name == "native") chosen = &kNativeBackend;
    if (name == "cuda") chosen = &kCudaBackend;
  }
  if (place != nullptr) place->store(chosen, std::memory_order_release);
  return *chosen;
}

LinearRoute linear_route(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                         const OptionalTensor& adapter_index, bool (*is_capturing)(const at::Tensor& x)) {
  const LinearKey key = key_of(x, weight, bias, input_scale, output_scale, adapter_index);
  std::optional<Routes> routes;
  {
    const std::shared_lock lock(routes_mutex);
    if (const auto found = known_routes.find(key); found != known_routes.end()) routes = found->second;
  }
  if (!routes) {
    bool holds = false;
    {
      py::gil_scoped_acquire gil;
      const auto answer =
          function("linear_route")(x, weight, bias, input_scale, output_scale, adapter_index, is_capturing(x))
              .cast<std::tuple<std::string, std::string, int, bool>>();
      routes = {route_of(std::get<0>(answer)), route_of(std::get<1>(answer)), std::get<2>(answer)};
      holds = std::get<3>(answer);
    }
    if (holds) {
      const std::unique_lock lock(routes_mutex);
      known_routes.emplace(key, *routes);
    }
  }
  const bool is_captured = routes->captured != routes->eager && is_capturing(x);
  return {is_captured ? routes->captured : routes->eager, routes->tile};
}

void forget_choices() {
  for (auto& of_device : backends) {
    for (auto& place : of_device) place.store(nullptr, std::memory_order_release);
  }
  const std::unique_lock lock(routes_mutex);
  known_routes.clear();
}

at::Tensor linear_by_triton(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                            const OptionalTensor& adapter_index) {
  py::gil_scoped_acquire gil;
  return function("linear_by_triton")(x, weight, bias, input_scale, output_scale, adapter_index).cast<at::Tensor>();
}

std::array<at::Tensor, 6> chunks_by_adapter(const at::Tensor& adapter_index, int64_t adapters, const at::Tensor& gate) {
  py::gil_scoped_acquire gil;
  return function("chunks")(adapter_index, adapters, gate).cast<std::array<at::Tensor, 6>>();
}

const Backend kPythonBackend = {activation, activation_backward, linear,
                                scale_pair, scale_pair_backward, scale_weight_};

}  // namespace ia3
