// scaled_linear on CPU tensors: which of three matmuls runs, and the threads around it.
#include <algorithm>
#include <string>

#include "../cpu/kernels.h"
#include "native.h"

namespace ia3 {
namespace {

// Where the library's own 16-bit matmul is used: what it computes for fewer rows costs more than the streaming kernel
constexpr int64_t kSmallRows16Bit = 16;

// Rows that pass by a panel at a time. More of them mean that W is packed less often, fewer that they and their sums
// stay in the second-level cache. Of very long rows fewer, so that the workspace keeps to some 32 MiB.
constexpr int64_t kRowBlock = 512, kFewestRows = 64;
constexpr int64_t kPackedElements = int64_t(8) << 20;

struct Problem {
  at::Tensor x;  // [*, in], or [rows, in] where its strides did not allow that view
  Rows x_rows;
  at::Tensor weight;  // as stored: [out, in], or [in, out] if transposed; rows dense
  bool transposed;
  OptionalTensor bias;
  ScaleRows input, output;
  int64_t rows, in, out;
  at::Tensor y;
  at::Tensor product;  // undefined where nobody asks for it
};

// For `rows` rows of the problem from `first` on: their x as the kernel reads it, their scales, and where they go
LinearArgs arguments(const Problem& p, const float* x, int64_t first, int64_t rows, const at::Tensor& bias) {
  const auto part = [&](const at::Tensor& whole) {
    char* const begin = whole.defined() ? static_cast<char*>(whole.mutable_data_ptr()) : nullptr;
    return begin == nullptr ? nullptr : begin + first * p.out * whole.element_size();
  };
  RowScales output = p.output.view;
  if (output.index != nullptr) output.index += first;
  return {dtype_of(p.x),
          x,
          rows,
          p.in,
          p.out,
          p.weight.const_data_ptr(),
          p.weight.stride(0),
          p.transposed,
          p.bias ? bias.const_data_ptr() : nullptr,
          p.output.present(),
          output,
          part(p.y),
          part(p.product)};
}

void small_linear(const Problem& p) {
  const auto& kernels = cpu::kernels();
  const auto* x = static_cast<const float*>(p.x_rows.data);
  at::Tensor wide;
  if (p.x.scalar_type() != at::kFloat || p.input.present() || p.x_rows.stride != p.in) {
    wide = at::detail::empty_cpu({p.rows, p.in}, at::kFloat);
    float* const widened = wide.mutable_data_ptr<float>();
    kernels.widen(dtype_of(p.x), p.x_rows.data, p.x_rows.stride, p.in, p.input.pointer(), widened, 0, p.rows);
    x = widened;
  }
  const at::Tensor bias = p.bias ? p.bias->contiguous() : at::Tensor();
  const LinearArgs args = arguments(p, x, 0, p.rows, bias);
  // Multiples of four outputs, which the kernel computes together
  const int64_t groups = (p.out + 3) / 4;
  parallel(groups, p.in * p.out,
           [&](int64_t begin, int64_t end) { kernels.small_linear(args, 4 * begin, std::min(4 * end, p.out)); });
}

// Scratch that this thread keeps: to map and touch tens of megabytes anew in each call costs as much as using them.
at::Tensor workspace(int64_t elements) {
  static thread_local at::Tensor kept;
  if (!kept.defined() || kept.numel() < elements) {
    kept = at::Tensor();  // give the old one back first
    // An ordinary tensor even when first needed in inference mode: it outlives that mode.
    const c10::InferenceMode ordinary(false);
    kept = at::empty({elements}, at::kFloat);
  }
  return kept;
}

// The blocked matmul: operands widen to fp32 while they are packed. Where the processor's bf16 instruction runs at less
// than the fp32 rate, this is faster than the library's bf16 matmul, and more accurate: scales and bias meet fp32
// values on both sides, and the only rounding is the last.
void widened_linear(const Problem& p) {
  const auto& kernels = cpu::kernels();
  const auto& blocking = kernels.blocking;
  const DType dtype = dtype_of(p.x);
  const int64_t element = p.x.element_size();
  const at::Tensor bias = p.bias ? p.bias->contiguous() : at::Tensor();
  const auto round_up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  const int64_t row_block = std::min(p.rows, std::clamp(kPackedElements / p.in, kFewestRows, kRowBlock));
  const int64_t threads = at::get_num_threads();
  const int64_t x_size = row_block * round_up(p.in, blocking.depth);
  const int64_t sums_size = row_block * blocking.group * blocking.lanes;
  float* const packed = workspace(x_size + threads * sums_size).mutable_data_ptr<float>();

  for (int64_t row = 0; row < p.rows; row += row_block) {
    const int64_t rows = std::min(row_block, p.rows - row);
    RowScales input = p.input.view;
    if (input.index != nullptr) input.index += row;
    const auto* x = static_cast<const char*>(p.x_rows.data) + row * p.x_rows.stride * element;
    parallel(rows, rows * p.in, [&](int64_t begin, int64_t end) {
      kernels.pack_rows(dtype, x, p.x_rows.stride, p.in, p.input.present() ? &input : nullptr, rows, packed, begin,
                        end);
    });
    const LinearArgs args = arguments(p, packed, row, rows, bias);
    // Panels first: each is packed by one thread. With fewer panels than threads, some threads share one, and its rows.
    const int64_t panels = (p.out + blocking.lanes - 1) / blocking.lanes;
    const int64_t tiles = (rows + blocking.tile_rows - 1) / blocking.tile_rows;
    const int64_t parts = std::clamp<int64_t>(threads / panels, 1, tiles);
    parallel(parts * panels, rows * p.in * p.out, [&](int64_t begin, int64_t end) {
      float* const sums = packed + x_size + at::get_thread_num() * sums_size;
      while (begin < end) {
        const int64_t part = begin / panels, first = begin % panels;
        const int64_t last = std::min(panels, first + end - begin);
        kernels.blocked_linear(args, rows * part / parts, rows * (part + 1) / parts, first, last, sums);
        begin += last - first;
      }
    });
  }
}

// to <- from, scaled row by row
void scale_rows(DType dtype, const Rows& from, const RowScales& scales, const at::Tensor& to) {
  const auto& kernels = cpu::kernels();
  const ActivationArgs args{dtype,  Activation::kIdentity, from.data, from.stride, nullptr, 0,
                            scales, to.mutable_data_ptr(), from.cols};
  parallel(from.count, to.numel(),
           [&](int64_t begin, int64_t end) { kernels.activation(args, begin, end, 0, from.cols); });
}

// The library's matmul in the operands' dtype, then the scale in one pass over its output: in place, or from the
// product that somebody keeps.
void library_linear(Problem& p, bool keeps_product) {
  at::Tensor x = p.x;
  if (p.input.present()) {
    x = empty_output(p.x.sizes(), p.x);
    scale_rows(dtype_of(x), p.x_rows, p.input.view, x);
  }
  p.product = at::linear(x, p.transposed ? p.weight.t() : p.weight, p.bias);
  p.y = keeps_product ? empty_output(p.product.sizes(), x) : p.product;
  if (p.output.present()) scale_rows(dtype_of(x), rows_of(p.product), p.output.view, p.y);
}

bool widens(at::ScalarType dtype) {
  static const std::string requested = [] {
    cpu::kernels();  // which complains of a wrong IA3_CPU_ISA also where the library's matmul needs none of them
    const std::string value = cpu::environment_word("IA3_CPU_MATMUL");
    TORCH_CHECK(value == "auto" || value == "widen" || value == "library", "IA3_CPU_MATMUL is '", value,
                "'; expected auto, widen or library.");
    return value;
  }();
  if (dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  if (requested != "auto") return requested == "widen";
  static const cpu::FastMatmul library = cpu::fast_matmul();
  return !(dtype == at::kBFloat16 ? library.bfloat16 : library.float16);
}

// Whether the small kernel streams the weight for so few rows; for more, a blocked matmul reuses it better. The
// crossings were measured against MKL, oneDNN and the blocked one on an AVX-512 machine without AMX
// (docs/performance.md).
bool is_small(at::ScalarType dtype, bool transposed, int64_t rows) {
  if (dtype == at::kFloat) return rows <= (transposed ? 8 : 24);
  const int64_t against_blocked = transposed ? 6 : 24;
  return rows <= (widens(dtype) ? against_blocked : kSmallRows16Bit);
}

}  // namespace

at::Tensor native_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                         const OptionalTensor& adapter_index, at::Tensor* product) {
  const int64_t in = weight.size(1), out = weight.size(0);
  const at::DimVector shape = output_shape(x, out);
  const int64_t rows = c10::multiply_integers(shape.begin(), shape.end() - 1);
  if (rows == 0 || out == 0 || in == 0) {  // an empty sum is the bias alone
    const at::Tensor sum =
        bias ? bias->expand(shape).clone(at::MemoryFormat::Contiguous) : at::zeros(shape, x.options());
    if (product != nullptr) *product = sum;
    if (!output_scale) return sum;
    return native_activation(sum, std::nullopt, output_scale, Activation::kIdentity, adapter_index, std::nullopt);
  }

  const bool dense = weight.stride(1) == 1 || in == 1;
  const bool transposed = !dense && (weight.stride(0) == 1 || out == 1);
  const Rows x_rows = rows_of(x);
  Problem problem{x_rows.owner.defined() ? x_rows.owner : x,
                  x_rows,
                  dense        ? weight
                  : transposed ? weight.t()
                               : weight.contiguous(),
                  transposed,
                  bias,
                  {input_scale, input_scale ? adapter_index : std::nullopt, in, false},
                  {output_scale, output_scale ? adapter_index : std::nullopt, out, false},
                  rows,
                  in,
                  out,
                  {},
                  {}};
  const bool is_few = is_small(x.scalar_type(), transposed, rows);
  if (is_few || widens(x.scalar_type())) {
    problem.y = empty_output(shape, x);
    if (product != nullptr) problem.product = empty_output(shape, x);
    is_few ? small_linear(problem) : widened_linear(problem);
  } else {
    library_linear(problem, product != nullptr);
  }
  if (product != nullptr) *product = problem.product.view(shape);
  return problem.y.view(shape);
}

std::string matmul_route(at::ScalarType dtype) { return widens(dtype) ? "widen" : "library"; }

}  // namespace ia3
