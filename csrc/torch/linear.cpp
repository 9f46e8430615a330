#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>

#include "../cpu/kernels.h"
#include "operators.h"

namespace ia3 {
namespace {

// Where the library's own 16-bit matmul is used: what it computes for fewer rows costs more than our streaming kernel
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
  at::DimVector shape;  // of y
};

// For `rows` of the problem's rows: their x as the kernel reads it, the scales of their outputs, and where y goes
LinearArgs arguments(const Problem& p, const float* x, int64_t rows, const at::Tensor& bias, const RowScales& output,
                     void* y) {
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
          y};
}

at::Tensor small_linear(const Problem& p) {
  const at::Tensor y = empty_output(p.shape, p.x);
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
  const LinearArgs args = arguments(p, x, p.rows, bias, p.output.view, y.mutable_data_ptr());
  // Multiples of four outputs, which the kernel computes together
  const int64_t groups = (p.out + 3) / 4;
  parallel(groups, p.in * p.out,
           [&](int64_t begin, int64_t end) { kernels.small_linear(args, 4 * begin, std::min(4 * end, p.out)); });
  return y;
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

// Our own matmul: operands widen to fp32 while they are packed. Where the processor's bf16 instruction runs at less
// than the fp32 rate, this is faster than the library's bf16 matmul, and more accurate: scales and bias meet fp32
// values on both sides, and the only rounding is the last.
at::Tensor widened_linear(const Problem& p) {
  const at::Tensor y = empty_output(p.shape, p.x);
  const auto& kernels = cpu::kernels();
  const auto& blocking = kernels.blocking;
  const DType dtype = dtype_of(y);
  const int64_t element = y.element_size();
  const at::Tensor bias = p.bias ? p.bias->contiguous() : at::Tensor();
  const auto round_up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  const int64_t row_block = std::min(p.rows, std::clamp(kPackedElements / p.in, kFewestRows, kRowBlock));
  const int64_t threads = at::get_num_threads();
  const int64_t x_size = row_block * round_up(p.in, blocking.depth);
  const int64_t sums_size = row_block * blocking.group * blocking.lanes;
  float* const packed = workspace(x_size + threads * sums_size).mutable_data_ptr<float>();

  for (int64_t row = 0; row < p.rows; row += row_block) {
    const int64_t rows = std::min(row_block, p.rows - row);
    RowScales input = p.input.view, output = p.output.view;
    if (input.index != nullptr) input.index += row;
    if (output.index != nullptr) output.index += row;
    const auto* x = static_cast<const char*>(p.x_rows.data) + row * p.x_rows.stride * element;
    parallel(rows, rows * p.in, [&](int64_t begin, int64_t end) {
      kernels.pack_rows(dtype, x, p.x_rows.stride, p.in, p.input.present() ? &input : nullptr, rows, packed, begin,
                        end);
    });
    void* const to = static_cast<char*>(y.mutable_data_ptr()) + row * p.out * element;
    const LinearArgs args = arguments(p, packed, rows, bias, output, to);
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
  return y;
}

// The library's matmul in the operands' dtype, then bias and scale in one pass over the output, in place.
at::Tensor library_linear(const Problem& p) {
  const auto& kernels = cpu::kernels();
  const DType dtype = dtype_of(p.x);
  at::Tensor x = p.x;
  if (p.input.present()) {
    x = empty_output(p.x.sizes(), p.x);
    const ActivationArgs args{dtype,        Activation::kIdentity, p.x_rows.data, p.x_rows.stride, nullptr, 0,
                              p.input.view, x.mutable_data_ptr(),  p.in};
    parallel(p.rows, x.numel(), [&](int64_t begin, int64_t end) { kernels.activation(args, begin, end, 0, p.in); });
  }
  const at::Tensor weight = p.transposed ? p.weight.t() : p.weight;
  if (!p.output.present()) return at::linear(x, weight, p.bias).view(p.shape);
  const bool wide = x.scalar_type() == at::kFloat;
  // In fp32 the bias can wait for the pass over the output; a 16-bit matmul must add it before it rounds.
  const at::Tensor y = at::linear(x, weight, wide ? std::nullopt : p.bias);
  if (wide) {
    const at::Tensor bias = p.bias ? p.bias->contiguous() : at::Tensor();
    float* values = y.mutable_data_ptr<float>();
    parallel(p.rows, y.numel(), [&](int64_t begin, int64_t end) {
      kernels.narrow(dtype, values, p.out, p.out, 0, p.bias ? bias.const_data_ptr() : nullptr, &p.output.view, values,
                     p.out, begin, end);
    });
  } else {
    const ActivationArgs args{dtype, Activation::kIdentity, y.const_data_ptr(),   p.out, nullptr,
                              0,     p.output.view,         y.mutable_data_ptr(), p.out};
    parallel(p.rows, y.numel(), [&](int64_t begin, int64_t end) { kernels.activation(args, begin, end, 0, p.out); });
  }
  return y.view(p.shape);
}

double seconds(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

bool measure_widening_wins(at::ScalarType dtype) {
  constexpr int64_t kRows = 512, kSize = 512;  // some twenty milliseconds in all
  const at::Tensor x = at::ones({kRows, kSize}, dtype), weight = at::ones({kSize, kSize}, dtype);
  const Problem p{x,
                  rows_of(x),
                  weight,
                  false,
                  std::nullopt,
                  {std::nullopt, std::nullopt, kSize, false},
                  {std::nullopt, std::nullopt, kSize, false},
                  kRows,
                  kSize,
                  kSize,
                  {kRows, kSize}};
  double widened = std::numeric_limits<double>::infinity(), library = widened;
  widened_linear(p);
  library_linear(p);
  for (int i = 0; i < 8; ++i) {
    widened = std::min(widened, seconds([&] { widened_linear(p); }));
    library = std::min(library, seconds([&] { library_linear(p); }));
  }
  // A processor either lacks fast 16-bit instructions, and ours takes two thirds of the time, or has them, and the
  // library takes a fraction. So a tie is noise, or costs nothing, and goes to ours, which rounds once.
  return widened < 1.1 * library;
}

bool widens(at::ScalarType dtype) {
  static const std::string requested = [] {
    const char* variable = std::getenv("IA3_CPU_MATMUL");
    const std::string value = variable == nullptr || *variable == '\0' ? "auto" : variable;
    TORCH_CHECK(value == "auto" || value == "widen" || value == "library", "IA3_CPU_MATMUL is '", value,
                "'; expected auto, widen or library.");
    return value;
  }();
  if (dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  if (requested != "auto") return requested == "widen";
  static const bool bfloat16 = measure_widening_wins(at::kBFloat16);
  if (dtype == at::kBFloat16) return bfloat16;
  static const bool float16 = measure_widening_wins(at::kHalf);
  return float16;
}

// Whether our kernel streams the weight for so few rows; for more, a blocked matmul reuses it better. The crossings
// were measured against MKL, oneDNN and our own on an AVX-512 machine without AMX (docs/performance.md).
bool is_small(at::ScalarType dtype, bool transposed, int64_t rows) {
  if (dtype == at::kFloat) return rows <= (transposed ? 8 : 24);
  const int64_t against_ours = transposed ? 6 : 24;
  // The route is measured where it matters.
  if (rows <= std::min(against_ours, kSmallRows16Bit)) return true;
  return rows <= (widens(dtype) ? against_ours : kSmallRows16Bit);
}

}  // namespace

at::Tensor scaled_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                         const OptionalTensor& adapter_index) {
  constexpr std::string_view op = "scaled_linear";
  TORCH_CHECK(weight.dim() == 2, op, ": weight has shape ", weight.sizes(), "; expected [out, in].");
  const auto check_like_x = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " has dtype ", tensor.scalar_type(),
                ", but x has ", x.scalar_type(), "; convert one of them.");
    TORCH_CHECK(tensor.device() == x.device(), op, ": ", name, " is on ", tensor.device(), ", but x is on ", x.device(),
                "; move one of them.");
  };
  check_like_x("weight", weight);
  const int64_t in = weight.size(1), out = weight.size(0);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == in, op, ": x has shape ", x.sizes(), ", but weight has in_features ", in,
              "; expected them to be equal to x's last dimension.");
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out, op, ": bias has shape ", bias->sizes(), "; expected [", out,
                "].");
    check_like_x("bias", *bias);
  }
  check_scale(op, "input_scale", input_scale, in, x, adapter_index);
  check_scale(op, "output_scale", output_scale, out, x, adapter_index);
  check_index(op, adapter_index, x, {&input_scale, &output_scale});
  dtype_of(x);

  at::DimVector shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.push_back(out);
  const int64_t rows = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
  if (rows == 0 || out == 0) return empty_output(shape, x);
  if (in == 0) {  // an empty sum: the bias alone, scaled
    const at::Tensor y = bias ? bias->expand(shape) : at::zeros(shape, x.options());
    return output_scale ? activation(op, y, std::nullopt, output_scale, "identity", adapter_index) : y.contiguous();
  }

  const bool dense = weight.stride(1) == 1 || in == 1;
  const bool transposed = !dense && (weight.stride(0) == 1 || out == 1);
  const Rows x_rows = rows_of(x);
  const Problem problem{x_rows.owner.defined() ? x_rows.owner : x,
                        x_rows,
                        dense        ? weight
                        : transposed ? weight.t()
                                     : weight.contiguous(),
                        transposed,
                        bias,
                        {input_scale, adapter_index, in, false},
                        {output_scale, adapter_index, out, false},
                        rows,
                        in,
                        out,
                        shape};
  return is_small(x.scalar_type(), transposed, rows) ? small_linear(problem)
         : widens(x.scalar_type())                   ? widened_linear(problem)
                                                     : library_linear(problem);
}

std::string matmul_route(at::ScalarType dtype) { return widens(dtype) ? "widen" : "library"; }

bool recovers_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& output_scale) {
  // fp16's range is narrow: z s may round to a subnormal or overflow where z does not.
  if (x.scalar_type() == at::kHalf) return false;
  // The library's 16-bit matmul rounds z before it is scaled; y / s would then carry two roundings, z itself one.
  const int64_t rows = x.numel() / std::max<int64_t>(1, weight.size(1));
  if (x.scalar_type() == at::kBFloat16 && rows > kSmallRows16Bit && !widens(at::kBFloat16)) return false;
  const at::Tensor scale = output_scale.to(at::kFloat).contiguous();
  const float* s = scale.const_data_ptr<float>();
  constexpr float kSmallest = 0x1p-20f, kLargest = 0x1p20f;
  for (int64_t i = 0; i < scale.numel(); ++i) {
    const float magnitude = std::fabs(s[i]);
    // Written so that NaN fails too
    if (!(magnitude >= kSmallest && magnitude <= kLargest)) return false;
  }
  return true;
}

}  // namespace ia3
