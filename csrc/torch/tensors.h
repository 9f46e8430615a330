// From tensors to the kernels' raw arguments: types, rows, scales, threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <array>
#include <chrono>
#include <optional>
#include <string_view>

#include "../core/arguments.h"

namespace ia3 {

// By Activation
constexpr std::array<std::string_view, 6> kActivationNames = {"silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"};

using OptionalTensor = std::optional<at::Tensor>;

// Elements below which a second thread costs more than it saves
constexpr int64_t kParallelGrain = 32768;

// Of fp32, bf16 or fp16; the kernels have no other
DType dtype_of(const at::Tensor& tensor);

// A tensor [*, n] seen as [rows, n], with adjacent elements in a row.
struct Rows {
  const void* data;
  int64_t count, cols, stride;
  at::Tensor owner;  // of a copy, if the strides needed one
};

Rows rows_of(const at::Tensor& x);

// An uninitialized contiguous CPU tensor of x's dtype. Large ones ask for huge pages: first touching 4 KiB pages costs
// more than writing them.
at::Tensor empty_output(at::IntArrayRef sizes, const at::Tensor& x);

// What stands for a gradient that nobody asked for
inline at::Tensor nothing_like(const at::Tensor& x) { return at::empty({0}, x.options()); }

// The shape [*, features] of a linear layer's output for x [*, in]
at::DimVector output_shape(const at::Tensor& x, int64_t features);

// A scale as a vector: one that is shared by all rows may come as PEFT stores it, [n, 1] or [1, n].
inline at::Tensor as_vector(const at::Tensor& scale) { return scale.dim() == 1 ? scale : scale.view_symint({-1}); }
inline OptionalTensor as_vector(const OptionalTensor& scale, const OptionalTensor& adapter_index) {
  return scale && !adapter_index ? OptionalTensor(as_vector(*scale)) : scale;
}

// The index of a scale [A, n]; none for a vector, which every row shares
inline OptionalTensor index_of(const OptionalTensor& scale, const OptionalTensor& adapter_index) {
  return scale && scale->dim() == 2 ? adapter_index : std::nullopt;
}

// A scale as fp32 in adjacent elements: itself where it is that already.
at::Tensor as_factors(const at::Tensor& scale);

// Scales converted for the CPU's kernels, with the tensors that own their memory.
struct ScaleRows {
  ScaleRows(const OptionalTensor& scale, const OptionalTensor& adapter_index, int64_t size, bool ones_if_absent);

  bool present() const { return view.scale != nullptr; }
  const RowScales* pointer() const { return present() ? &view : nullptr; }

  at::Tensor scale, ones, index;
  RowScales view;
};

// Learns, for each calling thread, whether other threads pay. Where another process holds a core, a region of a tenth
// of a millisecond ends with a wait of several for a thread that is not running. A caller that waited for longer than
// the whole work would have taken it runs as much, and less, alone for a multiple of that wait, and then tries again.
class Crowding {
 public:
  using Clock = std::chrono::steady_clock;

  static Crowding& here();

  bool alone(int64_t elements) const { return elements <= small_ && Clock::now() < until_; }
  // Of a region of `elements` over `threads`: when it began, when the caller's own share was done, when all was
  void learn(int64_t elements, int threads, Clock::time_point begin, Clock::time_point own, Clock::time_point end);

 private:
  int64_t small_ = 0;
  Clock::time_point until_;
};

// Splits [0, total) over threads where `elements` in all make it worthwhile.
template <typename Function>
void parallel(int64_t total, int64_t elements, const Function& function) {
  const int64_t each = std::max<int64_t>(1, elements / std::max<int64_t>(1, total));
  const int64_t grain = std::max<int64_t>(1, kParallelGrain / each);
  Crowding& crowding = Crowding::here();
  if (total <= grain || crowding.alone(elements)) {
    if (total > 0) function(int64_t(0), total);
    return;
  }
  const auto begin = Crowding::Clock::now();
  auto own = begin;
  at::parallel_for(0, total, grain, [&](int64_t from, int64_t to) {
    function(from, to);
    if (at::get_thread_num() == 0) own = Crowding::Clock::now();
  });
  const int threads = int(std::min<int64_t>(at::get_num_threads(), (total + grain - 1) / grain));
  crowding.learn(elements, threads, begin, own, Crowding::Clock::now());
}

}  // namespace ia3
