// Compiled once per instruction set (see CMakeLists.txt), with IA3_ISA naming the namespace.
#include "kernels.h"

#include "../core/blocked_linear.h"
#include "../core/exact_scale.h"
#include "../core/gated_activation.h"
#include "../core/scale.h"
#include "../core/scale_pair.h"
#include "../core/small_linear.h"

#define IA3_STRING_(x) #x
#define IA3_STRING(x) IA3_STRING_(x)

namespace ia3::IA3_ISA {
namespace {

// Calls function(pointer of the element type) for the runtime dtype.
template <typename Function>
void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return function(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return function(static_cast<Float16*>(nullptr));
  }
}

void activation(const ActivationArgs& args, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  with_type(args.dtype, [&]<typename T>(T*) {
    visit_activation<T>(args.activation, args.up != nullptr, [&]<typename Act, bool kGated>() {
      gated_activation_fwd_kernel<T, Act, kGated>(args, row_begin, row_end, col_begin, col_end);
    });
  });
}

void activation_backward(const ActivationGradArgs& args, const int64_t* rows, const float* scale, float* partial,
                         float* lost, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  with_type(args.dtype, [&]<typename T>(T*) {
    visit_activation<T>(args.activation, args.up != nullptr, [&]<typename Act, bool kGated>() {
      gated_activation_bwd_kernel<T, Act, kGated>(args, rows, scale, partial, lost, row_begin, row_end, col_begin,
                                                  col_end);
    });
  });
}

void scale_pair(const ScalePairArgs& args, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  with_type(args.dtype,
            [&]<typename T>(T*) { scale_pair_fwd_kernel<T>(args, row_begin, row_end, col_begin, col_end); });
}

void scale_pair_backward(const ScalePairGradArgs& args, float* const (&partials)[2], float* lost, int64_t row_begin,
                         int64_t row_end, int64_t col_begin, int64_t col_end) {
  const bool wants_all = args.grad_x != nullptr && partials[0] != nullptr && partials[1] != nullptr;
  with_type(args.dtype, [&]<typename T>(T*) {
    const auto kernel = wants_all ? scale_pair_bwd_kernel<T, true> : scale_pair_bwd_kernel<T, false>;
    kernel(args, partials, lost, row_begin, row_end, col_begin, col_end);
  });
}

void scale_weight(DType dtype, void* weight, int64_t stride, int64_t cols, const float* row_scale,
                  const float* col_scale, int64_t row_begin, int64_t row_end) {
  with_type(dtype, [&](auto* type) {
    scale_weight_kernel(static_cast<decltype(type)>(weight), stride, cols, row_scale, col_scale, row_begin, row_end);
  });
}

int64_t merge_exact(const ExactScaleArgs& args, int64_t row_begin, int64_t row_end, Escape* escapes) {
  int64_t count = 0;
  with_type(args.dtype, [&]<typename T>(T*) { count = merge_exact_kernel<T>(args, row_begin, row_end, escapes); });
  return count;
}

void unmerge_exact(const ExactScaleArgs& args, int64_t row_begin, int64_t row_end) {
  with_type(args.dtype, [&]<typename T>(T*) { unmerge_exact_kernel<T>(args, row_begin, row_end); });
}

bool stays_finite(const ExactScaleArgs& args, int64_t row_begin, int64_t row_end) {
  bool finite = true;
  with_type(args.dtype, [&]<typename T>(T*) { finite = stays_finite_kernel<T>(args, row_begin, row_end); });
  return finite;
}

void widen(DType dtype, const void* x, int64_t stride, int64_t cols, const RowScales* scales, float* out,
           int64_t row_begin, int64_t row_end) {
  with_type(dtype, [&]<typename T>(T*) {
    widen_kernel(static_cast<const T*>(x), stride, cols, scales, out, row_begin, row_end);
  });
}

void small_linear(const LinearArgs& args, int64_t out_begin, int64_t out_end) {
  with_type(args.dtype, [&]<typename T>(T*) { small_linear_fwd_kernel<T>(args, out_begin, out_end); });
}

void pack_rows(DType dtype, const void* x, int64_t stride, int64_t in, const RowScales* scales, int64_t rows,
               float* out, int64_t row_begin, int64_t row_end) {
  with_type(dtype, [&]<typename T>(T*) {
    pack_rows_kernel(static_cast<const T*>(x), stride, in, scales, rows, out, row_begin, row_end);
  });
}

void blocked_linear(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                    float* sums) {
  with_type(args.dtype,
            [&]<typename T>(T*) { blocked_linear_kernel<T>(args, row_begin, row_end, panel_begin, panel_end, sums); });
}

}  // namespace

extern const cpu::Kernels kKernels;
const cpu::Kernels kKernels = {
    IA3_STRING(IA3_ISA), activation,    activation_backward, scale_pair,
    scale_pair_backward, scale_weight,  merge_exact,         unmerge_exact,
    stays_finite,        widen,         small_linear,        {kDepth, kLanes, kGroup, kTileRows},
    pack_rows,           blocked_linear};

}  // namespace ia3::IA3_ISA
