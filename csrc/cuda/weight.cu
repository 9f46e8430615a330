// W <- diag(s) W, or W diag(s), in place: rows N, columns K, b bytes a weight.
//
// Memory-bound: 2 N K b bytes, one flop a weight. Every weight is read and written by one thread, at
// kRowsAtOnce rows of which the loads are in flight together.
#include "instructions.h"
#include "launch.h"
#include "scales.h"

namespace ia3::cuda {
namespace {

constexpr int kRowsAtOnce = 8;

template <typename T, int kSize, bool kScalesRows>
__global__ void __launch_bounds__(kThreads) scale_weight_kernel(const __grid_constant__ ia3_scale_weight_args args) {
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kSize;
  if (col >= args.cols) return;
  T* weight = static_cast<T*>(args.weight) + col;
  float s[kSize];
  if constexpr (!kScalesRows) load_floats(args.col_scale + col, s);
  const int64_t rows_a_block = int64_t(blockDim.y) * kRowsAtOnce;
  for (int64_t first = blockIdx.y * rows_a_block + threadIdx.y; first < args.rows; first += gridDim.y * rows_a_block) {
    Elements<T, kSize> w[kRowsAtOnce];
    float row_scale[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t row = first + i * int64_t(blockDim.y);
      if (row >= args.rows) continue;
      w[i].load(weight + row * args.weight_stride);
      if constexpr (kScalesRows) row_scale[i] = args.row_scale[row];
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t row = first + i * int64_t(blockDim.y);
      if (row >= args.rows) continue;
      if constexpr (kScalesRows) fill(s, row_scale[i]);
      // w <- w s
      float values[kSize];
      w[i].widen(values);
#pragma unroll
      for (int j = 0; j < kSize; ++j) values[j] *= s[j];
      w[i].round(values);
      w[i].store(weight + row * args.weight_stride);
    }
  }
}

template <typename T, int kSize>
ia3_status run(const ia3_scale_weight_args& args, ia3_stream stream) {
  const Tiling tiling = tile(args.rows, ceil_div<int64_t>(args.cols, kSize), kRowsAtOnce);
  const auto kernel =
      args.row_scale != nullptr ? scale_weight_kernel<T, kSize, true> : scale_weight_kernel<T, kSize, false>;
  return launch(kernel, tiling.grid, tiling.block, args, stream);
}

ia3_status check_one_scale(const ia3_scale_weight_args& args) {
  if (args.rows == 0 || args.cols == 0 || (args.row_scale == nullptr) != (args.col_scale == nullptr)) return IA3_OK;
  return fail(IA3_INVALID, "row_scale and col_scale are %s; expected exactly one of them.",
              args.row_scale == nullptr ? "both null" : "both given");
}

}  // namespace
}  // namespace ia3::cuda

ia3_status ia3_cuda_scale_weight(const ia3_scale_weight_args* args, ia3_stream stream) {
  using namespace ia3::cuda;
  const ia3_status status =
      last_failure({check_one_scale(*args),
                    check_matrix({"weight", args->weight, args->weight_stride}, args->rows, args->cols, true),
                    check_dtype(args->dtype), check_sizes(args->rows, args->cols)});
  if (status != IA3_OK) return status;
  if (args->rows == 0 || args->cols == 0) return IA3_OK;
  return visit_dtype(args->dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = args->cols % kWide<T> == 0 && is_on_16_bytes(args->col_scale) &&
                         are_rows_on_16_bytes(sizeof(T), {{"weight", args->weight, args->weight_stride}});
    return is_wide ? run<T, kWide<T>>(*args, stream) : run<T, 1>(*args, stream);
  });
}
