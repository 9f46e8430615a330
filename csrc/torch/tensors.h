// From tensors to the kernels' raw arguments: checks, shapes, scales, threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <optional>
#include <string_view>

#include "../core/arguments.h"

namespace ia3 {

using OptionalTensor = std::optional<at::Tensor>;

// Elements below which a second thread costs more than it saves
constexpr int64_t kParallelGrain = 32768;

DType dtype_of(const at::Tensor& tensor);

Activation activation_of(std::string_view op, std::string_view name);

// A tensor [*, n] seen as [rows, n], with adjacent elements in a row.
struct Rows {
  const void* data;
  int64_t count, cols, stride;
  at::Tensor owner;  // of a copy, if the strides needed one
};

Rows rows_of(const at::Tensor& x);

// An uninitialized contiguous tensor of x's dtype. Large ones ask for huge pages: first touching 4 KiB pages costs more
// than writing them.
at::Tensor empty_output(at::IntArrayRef sizes, const at::Tensor& x);

void check_scale(std::string_view op, std::string_view name, const OptionalTensor& scale, int64_t size,
                 const at::Tensor& x, const OptionalTensor& adapter_index);

// Checks the index's shape, dtype, device and bounds.
void check_index(std::string_view op, const OptionalTensor& adapter_index, const at::Tensor& x,
                 std::initializer_list<const OptionalTensor*> scales);

// Scales converted for the kernels, with the tensors that own their memory.
struct ScaleRows {
  ScaleRows(const OptionalTensor& scale, const OptionalTensor& adapter_index, int64_t size, bool ones_if_absent);

  bool present() const { return view.scale != nullptr; }
  const RowScales* pointer() const { return present() ? &view : nullptr; }

  at::Tensor scale, ones, index;
  RowScales view;
};

// Splits [0, total) over threads where `elements` in all make it worthwhile.
template <typename Function>
void parallel(int64_t total, int64_t elements, const Function& function) {
  const int64_t each = std::max<int64_t>(1, elements / std::max<int64_t>(1, total));
  at::parallel_for(0, total, std::max<int64_t>(1, kParallelGrain / each), function);
}

}  // namespace ia3
