// Activations, and a pair of scaled copies, on CPU tensors: threads, and sums over rows in two stages.
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <vector>

#include "../cpu/kernels.h"
#include "native.h"

namespace ia3 {
namespace {

// Rows that one partial sum of ds covers. Fixed, so that the bits do not depend on the number of threads.
constexpr int64_t kChunkRows = 64;
// Columns a task visits at a time: their partial sums (8 KiB) stay in the first-level cache.
constexpr int64_t kColumnBlock = 2048;

// Rows that share one scale, at most kChunkRows of them: the unit of the first reduction stage.
struct Chunk {
  int64_t adapter;  // -1: no adapter, no ds
  int64_t begin, end;
};

// Rows grouped by adapter (a stable counting sort), cut into chunks. Without an index all rows are adapter 0, in place,
// and `order` stays empty.
struct RowPlan {
  std::vector<int64_t> order;
  c10::SmallVector<Chunk, 8> chunks;

  RowPlan(const int32_t* index, int64_t rows, int64_t adapters) {
    c10::SmallVector<int64_t, 8> starts = {0, 0, rows};  // adapter a's rows begin at starts[a + 1]
    if (index != nullptr) {
      starts.assign(size_t(adapters) + 2, 0);
      for (int64_t r = 0; r < rows; ++r) ++starts[size_t(index[r] + 2)];
      for (size_t a = 1; a < starts.size(); ++a) starts[a] += starts[a - 1];
      c10::SmallVector<int64_t, 8> next(starts.begin(), starts.end() - 1);
      order.resize(size_t(rows));
      for (int64_t r = 0; r < rows; ++r) order[size_t(next[size_t(index[r] + 1)]++)] = r;
    }
    for (int64_t a = -1; a + 2 < int64_t(starts.size()); ++a) {
      for (int64_t begin = starts[size_t(a + 1)]; begin < starts[size_t(a + 2)]; begin += kChunkRows) {
        chunks.push_back({a, begin, std::min(begin + kChunkRows, starts[size_t(a + 2)])});
      }
    }
  }
};

bool is_whole(const RowPlan& plan, const at::Tensor& scale) { return plan.chunks.size() == 1 && scale.dim() == 1; }

// Room for the chunks' sums [chunks, cols]; of a single one, for the gradient of a vector itself.
at::Tensor empty_partials(const RowPlan& plan, const at::Tensor& scale) {
  if (is_whole(plan, scale)) return at::detail::empty_cpu(scale.sizes(), at::kFloat);
  return at::detail::empty_cpu({int64_t(plan.chunks.size()), scale.size(-1)}, at::kFloat);
}

// The second stage: ds[a, i] = sum over the chunks of adapter a, in order, in double.
at::Tensor reduce_partials(const at::Tensor& partials, const RowPlan& plan, const at::Tensor& scale) {
  const int64_t cols = scale.size(-1);
  if (is_whole(plan, scale)) return scale.scalar_type() == at::kFloat ? partials : partials.to(scale.scalar_type());
  const auto& chunks = plan.chunks;
  const at::Tensor result = at::zeros(scale.sizes(), at::kFloat);
  float* sums = result.mutable_data_ptr<float>();
  const float* parts = partials.const_data_ptr<float>();
  parallel(cols, partials.numel(), [&](int64_t begin, int64_t end) {
    std::vector<double> totals(size_t(end - begin));
    for (size_t c = 0; c < chunks.size();) {
      const int64_t adapter = chunks[c].adapter;
      std::fill(totals.begin(), totals.end(), 0.0);
      for (; c < chunks.size() && chunks[c].adapter == adapter; ++c) {
        const float* part = parts + int64_t(c) * cols;
        if (adapter < 0) continue;
        for (int64_t i = begin; i < end; ++i) totals[size_t(i - begin)] += part[i];
      }
      if (adapter < 0) continue;
      for (int64_t i = begin; i < end; ++i) sums[adapter * cols + i] = float(totals[size_t(i - begin)]);
    }
  });
  return result.to(scale.scalar_type());
}

}  // namespace

at::Tensor native_activation(const at::Tensor& gate, const OptionalTensor& up, const OptionalTensor& scale,
                             Activation activation, const OptionalTensor& adapter_index, const OptionalTensor& out) {
  const at::Tensor result = out ? *out : empty_output(gate.sizes(), gate);
  if (gate.numel() == 0) return result;

  const Rows g = rows_of(gate), u = up ? rows_of(*up) : Rows{};
  const int64_t rows = g.count, cols = g.cols;
  const ScaleRows scales(scale, adapter_index, cols, true);
  const ActivationArgs args{
      dtype_of(gate), activation, g.data, g.stride, u.data, u.stride, scales.view, result.mutable_data_ptr(), cols};
  const auto& kernels = cpu::kernels();
  // Tasks are blocks of columns of one row, so that a single long row splits too.
  const int64_t blocks = (cols + kColumnBlock - 1) / kColumnBlock;
  if (rows >= 2 * at::get_num_threads() || blocks == 1) {
    parallel(rows, rows * cols, [&](int64_t begin, int64_t end) { kernels.activation(args, begin, end, 0, cols); });
  } else {
    parallel(rows * blocks, rows * cols, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / blocks, col = task % blocks * kColumnBlock;
        kernels.activation(args, row, row + 1, col, std::min(col + kColumnBlock, cols));
      }
    });
  }
  return result;
}

Gradients native_activation_backward(const at::Tensor& grad, const at::Tensor& gate, const OptionalTensor& up,
                                     const OptionalTensor& scale, Activation activation,
                                     const OptionalTensor& adapter_index, std::array<bool, 3> mask) {
  const bool wants_scale = mask[2] && scale;
  const auto output = [&](bool wanted) { return wanted ? empty_output(gate.sizes(), gate) : nothing_like(gate); };
  const at::Tensor grad_gate = output(mask[0]);
  const at::Tensor grad_up = up ? output(mask[1]) : at::Tensor();
  const at::Tensor no_scale = wants_scale ? at::Tensor() : nothing_like(scale ? *scale : gate);
  if (gate.numel() == 0) return {grad_gate, grad_up, wants_scale ? at::zeros_like(*scale) : no_scale};

  const Rows dh = rows_of(grad), g = rows_of(gate), u = up ? rows_of(*up) : Rows{};
  const int64_t rows = g.count, cols = g.cols;
  const ScaleRows scales(scale, adapter_index, cols, true);
  const ActivationGradArgs args{dtype_of(gate),
                                activation,
                                dh.data,
                                dh.stride,
                                g.data,
                                g.stride,
                                u.data,
                                u.stride,
                                mask[0] ? grad_gate.mutable_data_ptr() : nullptr,
                                mask[1] && up ? grad_up.mutable_data_ptr() : nullptr,
                                cols};

  const RowPlan plan(scales.view.index, rows, adapter_index ? scale->size(0) : 1);
  const int64_t count = int64_t(plan.chunks.size());
  const at::Tensor partials = wants_scale ? empty_partials(plan, *scale) : at::Tensor();
  float* parts = wants_scale ? partials.mutable_data_ptr<float>() : nullptr;
  const auto& kernels = cpu::kernels();
  const int64_t blocks = (cols + kColumnBlock - 1) / kColumnBlock;
  parallel(count * blocks, rows * cols, [&](int64_t begin, int64_t end) {
    std::array<float, kColumnBlock> lost;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / blocks, col = task % blocks * kColumnBlock;
      const Chunk& chunk = plan.chunks[size_t(c)];
      const float* s = chunk.adapter < 0 ? scales.view.ones : scales.view.scale + chunk.adapter * cols;
      kernels.activation_backward(args, plan.order.empty() ? nullptr : plan.order.data(), s,
                                  parts == nullptr ? nullptr : parts + c * cols, lost.data(), chunk.begin, chunk.end,
                                  col, std::min(col + kColumnBlock, cols));
    }
  });
  return {grad_gate, grad_up, wants_scale ? reduce_partials(partials, plan, *scale) : no_scale};
}

std::tuple<at::Tensor, at::Tensor> native_scale_pair(const at::Tensor& x, const at::Tensor& first,
                                                     const at::Tensor& second) {
  const at::Tensor a = empty_output(x.sizes(), x), b = empty_output(x.sizes(), x);
  if (x.numel() == 0) return {a, b};
  const Rows rows = rows_of(x);
  const at::Tensor s_a = as_factors(first), s_b = as_factors(second);
  const ScalePairArgs args{dtype_of(x),
                           rows.data,
                           rows.stride,
                           {s_a.const_data_ptr<float>(), s_b.const_data_ptr<float>()},
                           {a.mutable_data_ptr(), b.mutable_data_ptr()},
                           rows.cols};
  parallel(rows.count, x.numel(),
           [&](int64_t begin, int64_t end) { cpu::kernels().scale_pair(args, begin, end, 0, rows.cols); });
  return {a, b};
}

Gradients native_scale_pair_backward(const at::Tensor& grad_first, const at::Tensor& grad_second, const at::Tensor& x,
                                     const at::Tensor& first, const at::Tensor& second, std::array<bool, 3> mask) {
  const at::Tensor grad_x = mask[0] ? empty_output(x.sizes(), x) : nothing_like(x);
  const std::array<at::Tensor, 2> scales{first, second};
  std::array<at::Tensor, 2> sums;
  if (x.numel() == 0) {
    for (size_t i = 0; i < 2; ++i) sums[i] = mask[i + 1] ? at::zeros_like(scales[i]) : nothing_like(scales[i]);
    return {grad_x, sums[0], sums[1]};
  }
  const Rows da = rows_of(grad_first), db = rows_of(grad_second), rows = rows_of(x);
  const at::Tensor s_a = as_factors(first), s_b = as_factors(second);
  const ScalePairGradArgs args{dtype_of(x),
                               {da.data, db.data},
                               {da.stride, db.stride},
                               rows.data,
                               rows.stride,
                               {s_a.const_data_ptr<float>(), s_b.const_data_ptr<float>()},
                               mask[0] ? grad_x.mutable_data_ptr() : nullptr,
                               rows.cols};
  const RowPlan plan(nullptr, rows.count, 1);
  const int64_t count = int64_t(plan.chunks.size()), cols = rows.cols;
  std::array<at::Tensor, 2> partials;
  for (size_t i = 0; i < 2; ++i) {
    if (mask[i + 1]) partials[i] = empty_partials(plan, scales[i]);
  }
  const auto part = [&](size_t i, int64_t chunk) {
    return mask[i + 1] ? partials[i].mutable_data_ptr<float>() + chunk * cols : nullptr;
  };
  const int64_t blocks = (cols + kColumnBlock - 1) / kColumnBlock;
  parallel(count * blocks, rows.count * cols, [&](int64_t begin, int64_t end) {
    std::array<float, 2 * kColumnBlock> lost;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / blocks, col = task % blocks * kColumnBlock;
      const Chunk& chunk = plan.chunks[size_t(c)];
      cpu::kernels().scale_pair_backward(args, {part(0, c), part(1, c)}, lost.data(), chunk.begin, chunk.end, col,
                                         std::min(col + kColumnBlock, cols));
    }
  });
  for (size_t i = 0; i < 2; ++i) {
    sums[i] = mask[i + 1] ? reduce_partials(partials[i], plan, scales[i]) : nothing_like(scales[i]);
  }
  return {grad_x, sums[0], sums[1]};
}

}  // namespace ia3
