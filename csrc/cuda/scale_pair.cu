// a = x s_a and b = x s_b, one input on its way into two layers (gate and up) with a scale each, and its backward:
// dx = da s_a + db s_b, ds_a = sum over rows of da x, ds_b = sum over rows of db x. Rows T, columns K, b bytes an
// element.
//
// Memory-bound: forward 3 T K b bytes and 2 T K flops, backward 4 T K b bytes, 16 K for every chunk of rows, and
// 7 T K flops. In bf16 at 3.35 TB/s an H100 has 52 instructions of a thread for an element forward, and 70 backward;
// T 4096 and K 4096 take it 30 us and 40 us at least.
//
// Forward, a thread stays in its columns, so that the vectors are read once for kRowsAtOnce rows, all of them in flight
// together. Backward, a warp stays in its columns and walks down the rows of its block's chunk, every kWarps-th of
// them; ds_a and ds_b collect in registers, and become one sum each by reduction.h.
#include "../core/elementwise.h"
#include "instructions.h"
#include "launch.h"
#include "reduction.h"

namespace ia3::cuda {
namespace {

constexpr int kRowsAtOnce = 4;          // one tensor is read
constexpr int kRowsAtOnceBackward = 2;  // three are

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) scale_pair_fwd_kernel(const __grid_constant__ ia3_scale_pair_args args) {
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kSize;
  if (col >= args.cols) return;
  const T* x = static_cast<const T*>(args.x) + col;
  float s[2][kSize];
#pragma unroll
  for (int v = 0; v < 2; ++v) load_floats(args.scales[v] + col, s[v]);
  const int64_t rows_a_block = int64_t(blockDim.y) * kRowsAtOnce;
  for (int64_t first = blockIdx.y * rows_a_block + threadIdx.y; first < args.rows; first += gridDim.y * rows_a_block) {
    Elements<T, kSize> in[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t row = first + i * int64_t(blockDim.y);
      if (row < args.rows) in[i].load(x + row * args.x_stride);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t row = first + i * int64_t(blockDim.y);
      if (row >= args.rows) continue;
      float values[kSize];
      in[i].widen(values);
      // a = x s_a ; b = x s_b
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        float scaled[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) scaled[j] = values[j] * s[v][j];
        Elements<T, kSize> out;
        out.round(scaled);
        out.store(static_cast<T*>(args.out[v]) + row * args.cols + col);
      }
    }
  }
}

// The call's arguments, and what the host derives from them
struct Backward {
  ia3_scale_pair_backward_args call;
  int64_t chunk_rows, chunks;
  unsigned int strips;     // of columns; a block takes one of a chunk
  unsigned int* arrivals;  // [strips]: chunks whose sums are in `partials`
  float* partials;         // [2, chunks, cols]
};

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads, 2) scale_pair_bwd_kernel(const __grid_constant__ Backward p) {
  constexpr int kRows = kRowsAtOnceBackward;
  const int64_t cols = p.call.cols;
  const int64_t strip_index = blockIdx.x % p.strips, chunk = blockIdx.x / p.strips;
  const int64_t strip = strip_index * kLanes * kSize;
  const int64_t col = strip + int64_t(threadIdx.x) * kSize;
  const int64_t last = min((chunk + 1) * p.chunk_rows, p.call.rows);
  const bool wants_x = p.call.grad_x != nullptr;
  const bool wants_scale[2] = {p.call.grad_scales[0] != nullptr, p.call.grad_scales[1] != nullptr};
  const bool wants_scales = wants_scale[0] || wants_scale[1];
  elementwise::Sum ds[2][kSize];
  if (col < cols) {
    float s[2][kSize];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (wants_x) load_floats(p.call.scales[v] + col, s[v]);
    }
    for (int64_t first = chunk * p.chunk_rows + threadIdx.y; first < last; first += kWarps * kRows) {
      Elements<T, kSize> d[2][kRows], x[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = first + i * kWarps;
        if (row >= last) continue;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          if (wants_x || wants_scale[v])
            d[v][i].load(static_cast<const T*>(p.call.grads[v]) + row * p.call.grad_strides[v] + col);
        }
        if (wants_scales) x[i].load(static_cast<const T*>(p.call.x) + row * p.call.x_stride + col);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = first + i * kWarps;
        if (row >= last) continue;
        float grads[2][kSize];
#pragma unroll
        for (int v = 0; v < 2; ++v) d[v][i].widen(grads[v]);
        if (wants_x) {
          // dx = da s_a + db s_b
          float dx[kSize];
#pragma unroll
          for (int j = 0; j < kSize; ++j) dx[j] = grads[0][j] * s[0][j] + grads[1][j] * s[1][j];
          Elements<T, kSize> out;
          out.round(dx);
          out.store(static_cast<T*>(p.call.grad_x) + row * cols + col);
        }
        if (!wants_scales) continue;
        // ds_a += da x ; ds_b += db x
        float values[kSize];
        x[i].widen(values);
#pragma unroll
        for (int v = 0; v < 2; ++v)
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            if constexpr (std::is_same_v<T, BFloat16>) {
              ds[v][j].total += grads[v][j] * values[j];  // terms that are no better than bf16, and a chunk's share
            } else {
              ds[v][j].add(grads[v][j] * values[j]);
            }
          }
      }
    }
  }
  if (!wants_scales) return;
  reduce(Reduction<2>{chunk,
                      0,
                      p.chunks,
                      cols,
                      strip,
                      p.arrivals + strip_index,
                      {p.partials, p.partials + p.chunks * cols},
                      {p.call.grad_scales[0], p.call.grad_scales[1]}},
         ds);
}

// --- host ---------------------------------------------------------------------------------------------------------

bool wants_scales(const ia3_scale_pair_backward_args& args) {
  return args.grad_scales[0] != nullptr || args.grad_scales[1] != nullptr;
}

// Of workspace; no address matters but for being null, since the workspace's size may not depend on it.
ReductionBytes bytes_for(const ia3_scale_pair_backward_args& args) {
  if (args.rows <= 0 || args.cols <= 0 || !wants_scales(args)) return {};
  const int64_t chunks = ceil_div(args.rows, rows_per_chunk(args.dtype, args.rows, args.cols));
  return chunks == 1 ? ReductionBytes{} : reduction_bytes(args.cols, 1, 2 * chunks);
}

template <typename T, int kSize>
ia3_status run_forward(const ia3_scale_pair_args& args, ia3_stream stream) {
  const Tiling tiling = tile(args.rows, ceil_div<int64_t>(args.cols, kSize), kRowsAtOnce);
  return launch(scale_pair_fwd_kernel<T, kSize>, tiling.grid, tiling.block, args, stream);
}

template <typename T, int kSize>
ia3_status run_backward(Backward& p, ia3_stream stream) {
  if (const ia3_status status = count_strips(p.call.cols, kSize, p.chunks, p.strips); status != IA3_OK) return status;
  return launch(scale_pair_bwd_kernel<T, kSize>, dim3(unsigned(p.strips * p.chunks)), dim3(kLanes, kWarps), p, stream);
}

ia3_status check_vector(const char* name, const float* vector, int64_t rows, int64_t cols) {
  if (vector != nullptr || rows == 0 || cols == 0) return IA3_OK;
  return fail(IA3_INVALID, "%s is null; expected a vector.", name);
}

ia3_status check(const ia3_scale_pair_args& args) {
  const int64_t rows = args.rows, cols = args.cols;
  return last_failure({check_matrix({"out[1]", args.out[1], cols}, rows, cols, true),
                       check_matrix({"out[0]", args.out[0], cols}, rows, cols, true),
                       check_vector("scales[1]", args.scales[1], rows, cols),
                       check_vector("scales[0]", args.scales[0], rows, cols),
                       check_matrix({"x", args.x, args.x_stride}, rows, cols, false), check_dtype(args.dtype),
                       check_sizes(rows, cols)});
}

// Of a matrix or vector that is read only where a result is wanted
ia3_status where(bool is_read, ia3_status status) { return is_read ? status : IA3_OK; }

ia3_status check(const ia3_scale_pair_backward_args& args) {
  const int64_t rows = args.rows, cols = args.cols;
  const bool wants_x = args.grad_x != nullptr;
  return last_failure({where(wants_x, check_vector("scales[1]", args.scales[1], rows, cols)),
                       where(wants_x, check_vector("scales[0]", args.scales[0], rows, cols)),
                       where(wants_scales(args), check_matrix({"x", args.x, args.x_stride}, rows, cols, false)),
                       where(wants_x || args.grad_scales[1] != nullptr,
                             check_matrix({"grads[1]", args.grads[1], args.grad_strides[1]}, rows, cols, false)),
                       where(wants_x || args.grad_scales[0] != nullptr,
                             check_matrix({"grads[0]", args.grads[0], args.grad_strides[0]}, rows, cols, false)),
                       check_dtype(args.dtype), check_sizes(rows, cols)});
}

}  // namespace
}  // namespace ia3::cuda

ia3_status ia3_cuda_scale_pair(const ia3_scale_pair_args* args, ia3_stream stream) {
  using namespace ia3::cuda;
  if (const ia3_status status = check(*args); status != IA3_OK) return status;
  if (args->rows == 0 || args->cols == 0) return IA3_OK;
  return visit_dtype(args->dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = args->cols % kWide<T> == 0 && is_on_16_bytes(args->scales[0]) &&
                         is_on_16_bytes(args->scales[1]) && is_on_16_bytes(args->out[0]) &&
                         is_on_16_bytes(args->out[1]) &&
                         are_rows_on_16_bytes(sizeof(T), {{"x", args->x, args->x_stride}});
    return is_wide ? run_forward<T, kWide<T>>(*args, stream) : run_forward<T, 1>(*args, stream);
  });
}

size_t ia3_cuda_scale_pair_backward_workspace(const ia3_scale_pair_backward_args* args) {
  const ia3::cuda::ReductionBytes bytes = ia3::cuda::bytes_for(*args);
  return bytes.arrivals + bytes.partials;
}

ia3_status ia3_cuda_scale_pair_backward(const ia3_scale_pair_backward_args* args, ia3_stream stream) {
  using namespace ia3::cuda;
  if (const ia3_status status = check(*args); status != IA3_OK) return status;
  if (args->cols == 0 || (args->grad_x == nullptr && !wants_scales(*args))) return IA3_OK;
  if (args->rows == 0) {
    for (float* sums : args->grad_scales) {
      if (sums == nullptr) continue;
      const ia3_status zeroed = checked(cudaMemsetAsync(sums, 0, size_t(args->cols) * sizeof(float), stream));
      if (zeroed != IA3_OK) return zeroed;
    }
    return IA3_OK;
  }
  Backward p{};
  p.call = *args;
  p.chunk_rows = rows_per_chunk(args->dtype, args->rows, args->cols);
  p.chunks = ceil_div(args->rows, p.chunk_rows);
  const ia3_status prepared = prepare_reduction(bytes_for(*args), args->workspace, stream, p.arrivals, p.partials);
  if (prepared != IA3_OK) return prepared;
  return visit_dtype(args->dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = args->cols % kWide<T> == 0 && is_on_16_bytes(args->scales[0]) &&
                         is_on_16_bytes(args->scales[1]) && is_on_16_bytes(args->grad_x) &&
                         are_rows_on_16_bytes(sizeof(T), {{"grads[0]", args->grads[0], args->grad_strides[0]},
                                                          {"grads[1]", args->grads[1], args->grad_strides[1]},
                                                          {"x", args->x, args->x_stride}});
    return is_wide ? run_backward<T, kWide<T>>(p, stream) : run_backward<T, 1>(p, stream);
  });
}
