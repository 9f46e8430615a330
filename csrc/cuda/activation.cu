// h = act(g) u s, for gated (u given) and plain (u absent) feed-forward layers, and with act the identity for a
// matmul's output. Rows T, columns I, b bytes an element.
//
// Memory-bound: 3 T I b bytes (plain: 2 T I b) and the vector; about 10 T I flops (silu). In bf16 at 3.35 TB/s an H100
// has 52 instructions of a thread for an element of the gated form and 35 for one of the plain form; silu takes 17
// and 15. A thread stays in its columns, so that the vector is read once for kRowsAtOnce rows, all of them in flight
// together.
#include "../core/elementwise.h"
#include "instructions.h"
#include "launch.h"
#include "scales.h"

namespace ia3::cuda {
namespace {

constexpr int kRowsAtOnce = 4;

// kActivation -1: decided at run time, for the path that is not wide
template <typename T, int kSize, int kActivation, bool kGated>
__global__ void __launch_bounds__(kThreads) activation_fwd_kernel(const __grid_constant__ ia3_activation_args args) {
  const auto activation = Activation(kActivation >= 0 ? kActivation : int(args.activation));
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kSize;
  if (col >= args.cols) return;
  const T* gate = static_cast<const T*>(args.gate) + col;
  const T* up = static_cast<const T*>(args.up) + col;
  T* out = static_cast<T*>(args.out) + col;
  float s[kSize];
  if (!differs_by_row(args.scale)) load_shared_scale(args.scale, col, s);
  const int64_t rows_a_block = int64_t(blockDim.y) * kRowsAtOnce;
  for (int64_t first = blockIdx.y * rows_a_block + threadIdx.y; first < args.rows; first += gridDim.y * rows_a_block) {
    Elements<T, kSize> g[kRowsAtOnce], u[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t row = first + i * int64_t(blockDim.y);
      if (row >= args.rows) continue;
      g[i].load(gate + row * args.gate_stride);
      if constexpr (kGated) u[i].load(up + row * args.up_stride);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t row = first + i * int64_t(blockDim.y);
      if (row >= args.rows) continue;
      if (differs_by_row(args.scale)) load_adapter(args.scale, args.scale.index[row], args.cols, col, s);
      // h = act(g) u s
      float h[kSize], factor[kSize];
      g[i].widen(h);
      if constexpr (kGated) u[i].widen(factor);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        h[j] = elementwise::activate<T>(activation, h[j]).value;
        if constexpr (kGated) h[j] *= factor[j];
        h[j] *= s[j];
      }
      g[i].round(h);
      g[i].store(out + row * args.out_stride);
    }
  }
}

template <typename T, int kSize, int kActivation>
ia3_status run(const ia3_activation_args& args, ia3_stream stream) {
  const Tiling tiling = tile(args.rows, ceil_div<int64_t>(args.cols, kSize), kRowsAtOnce);
  const auto kernel = args.up != nullptr ? activation_fwd_kernel<T, kSize, kActivation, true>
                                         : activation_fwd_kernel<T, kSize, kActivation, false>;
  return launch(kernel, tiling.grid, tiling.block, args, stream);
}

ia3_status check(const ia3_activation_args& args) {
  const void* up = args.up == nullptr ? args.gate : args.up;
  return last_failure({check_scale("scale", args.scale), check_activation(args.activation),
                       check_matrix({"out", args.out, args.out_stride}, args.rows, args.cols, true),
                       check_matrix({"up", up, args.up_stride}, args.rows, args.cols, false),
                       check_matrix({"gate", args.gate, args.gate_stride}, args.rows, args.cols, false),
                       check_dtype(args.dtype), check_sizes(args.rows, args.cols)});
}

}  // namespace
}  // namespace ia3::cuda

ia3_status ia3_cuda_activation(const ia3_activation_args* args, ia3_stream stream) {
  using namespace ia3::cuda;
  if (const ia3_status status = check(*args); status != IA3_OK) return status;
  if (args->rows == 0 || args->cols == 0) return IA3_OK;
  return visit_dtype(args->dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = args->cols % kWide<T> == 0 && is_on_16_bytes(args->scale.scale) &&
                         are_rows_on_16_bytes(sizeof(T), {{"gate", args->gate, args->gate_stride},
                                                          {"up", args->up, args->up_stride},
                                                          {"out", args->out, args->out_stride}});
    if (!is_wide) return run<T, 1, -1>(*args, stream);
    return visit_activation(args->activation,
                            [&](auto activation) { return run<T, kWide<T>, activation()>(*args, stream); });
  });
}
