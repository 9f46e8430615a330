// dg = dh s u act'(g), du = dh s act(g), ds = sum over rows of dh act(g) u: the backward of activation.cu, and, with
// the identity, the gradients of a matmul's output and its scale. Rows T, columns I, b bytes an element.
//
// Memory-bound: 5 T I b bytes (plain: 3 T I b), and 8 I for every chunk of rows; about 25 T I flops (silu). In bf16 at
// 3.35 TB/s an H100 has 87 instructions of a thread for an element of the gated form and 52 for one of the plain form;
// silu takes 27 and 19, the identity 11.
//
// A warp stays in its columns and walks down the rows of its block's chunk, every kWarps-th of them; ds collects in
// registers, and becomes one sum by reduction.h.
#include "../core/elementwise.h"
#include "instructions.h"
#include "launch.h"
#include "reduction.h"
#include "scales.h"

namespace ia3::cuda {
namespace {

// Rows of a thread whose loads are in flight together
template <bool kGated>
constexpr int kRowsAtOnce = kGated ? 2 : 4;

// The call's arguments, and what the host derives from them
struct Backward {
  ia3_activation_backward_args call;
  ia3_chunks given;        // the caller's chunks; or `chunks` of them, of `chunk_rows` rows as they come
  int64_t chunk_rows;      // 0: the chunks are given
  int32_t adapters;        // 1 without given chunks
  unsigned int strips;     // of columns; a block takes one of a chunk
  unsigned int* arrivals;  // [strips, adapters]: chunks whose sums are in `partials`
  float* partials;         // [chunks, cols]
};

struct Chunk {
  int64_t first, last;
  int32_t adapter;
};

__device__ __forceinline__ Chunk chunk_at(const Backward& p, int64_t chunk) {
  if (p.chunk_rows == 0) return {p.given.first[chunk], p.given.last[chunk], p.given.adapter[chunk]};
  const int64_t first = chunk * p.chunk_rows;
  return {first, first + p.chunk_rows < p.call.rows ? first + p.chunk_rows : p.call.rows, 0};
}

struct ChunkRange {
  int64_t first, last;
};

__device__ __forceinline__ ChunkRange chunks_of(const Backward& p, int32_t adapter) {
  if (p.chunk_rows == 0) return {p.given.adapter_first[adapter], p.given.adapter_last[adapter]};
  return {0, p.given.chunks};
}

template <typename T, int kSize, int kActivation, bool kGated>
__global__ void __launch_bounds__(kThreads, 2) activation_bwd_kernel(const __grid_constant__ Backward p) {
  constexpr int kRows = kRowsAtOnce<kGated>;
  const auto activation = Activation(kActivation >= 0 ? kActivation : int(p.call.activation));
  const int thread = int(threadIdx.y) * kLanes + int(threadIdx.x);
  const int64_t cols = p.call.cols;
  const int64_t strip_index = blockIdx.x % p.strips, chunk_index = blockIdx.x / p.strips;
  const int64_t strip = strip_index * kLanes * kSize;
  const int64_t col = strip + int64_t(threadIdx.x) * kSize;
  const bool owns = thread < kLanes * kSize && strip + thread < cols;
  const T* grad = static_cast<const T*>(p.call.grad) + col;
  const T* gate = static_cast<const T*>(p.call.gate) + col;
  const T* up = static_cast<const T*>(p.call.up) + col;
  T* grad_gate = static_cast<T*>(p.call.grad_gate) + col;
  T* grad_up = static_cast<T*>(p.call.grad_up) + col;
  const Chunk chunk = chunk_at(p, chunk_index);
  elementwise::Sum ds[1][kSize];
  if (col < cols) {
    float s[kSize];
    if (p.chunk_rows == 0 && p.call.scale.scale != nullptr) {
      load_adapter(p.call.scale, chunk.adapter, cols, col, s);
    } else {
      load_shared_scale(p.call.scale, col, s);
    }
    for (int64_t first = chunk.first + threadIdx.y; first < chunk.last; first += kWarps * kRows) {
      Elements<T, kSize> dh[kRows], g[kRows], u[kRows];
      int64_t row[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        row[i] = first + i * kWarps;
        if (row[i] >= chunk.last) continue;
        if (p.chunk_rows == 0) row[i] = p.given.order[row[i]];
        dh[i].load(grad + row[i] * p.call.grad_stride);
        g[i].load(gate + row[i] * p.call.gate_stride);
        if constexpr (kGated) u[i].load(up + row[i] * p.call.up_stride);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i * kWarps >= chunk.last) continue;
        // dg = dh s u act'(g) ; du = dh s act(g) ; ds += dh act(g) u
        float down[kSize], gates[kSize], ups[kSize], slopes[kSize];
        dh[i].widen(down);
        g[i].widen(gates);
        if constexpr (kGated) u[i].widen(ups);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const elementwise::Both act = elementwise::activate<T>(activation, gates[j]);
          const float scaled = down[j] * s[j];
          slopes[j] = scaled * act.derivative;
          float hidden = act.value;
          if constexpr (kGated) {
            slopes[j] *= ups[j];
            hidden *= ups[j];
            ups[j] = scaled * act.value;
          }
          if constexpr (std::is_same_v<T, BFloat16>) {
            ds[0][j].total += down[j] * hidden;  // terms that are no better than bf16, and a chunk's share of them
          } else {
            ds[0][j].add(down[j] * hidden);
          }
        }
        if (p.call.grad_gate != nullptr) {
          g[i].round(slopes);
          g[i].store(grad_gate + row[i] * cols);
        }
        if constexpr (kGated) {
          if (p.call.grad_up == nullptr) continue;
          u[i].round(ups);
          u[i].store(grad_up + row[i] * cols);
        }
      }
    }
  }
  if (p.call.grad_scale == nullptr) return;

  // Adapters without rows, shared out among the chunks' blocks
#pragma unroll 1
  for (int64_t adapter = chunk_index; adapter < p.adapters; adapter += p.given.chunks) {
    const ChunkRange range = chunks_of(p, int32_t(adapter));
    if (owns && range.first >= range.last) p.call.grad_scale[adapter * cols + strip + thread] = 0.0f;
  }
  if (chunk.adapter < 0 || chunk.adapter >= p.adapters) return;
  const ChunkRange range = chunks_of(p, chunk.adapter);
  reduce(Reduction<1>{chunk_index,
                      range.first,
                      range.last,
                      cols,
                      strip,
                      p.arrivals + strip_index * p.adapters + chunk.adapter,
                      {p.partials},
                      {p.call.grad_scale + chunk.adapter * cols}},
         ds);
}

// --- host ---------------------------------------------------------------------------------------------------------

struct Plan {
  int64_t chunk_rows;  // 0: the caller's chunks
  int64_t chunks;
  int32_t adapters;
  ReductionBytes bytes;  // of workspace
};

// A function of the sizes and of which pointers are null; of no address, since the workspace's size is.
Plan plan_for(const ia3_activation_backward_args& args) {
  Plan plan{};
  plan.adapters = 1;
  if (args.chunks != nullptr) {
    plan.chunks = args.chunks->chunks;
    plan.adapters = args.scale.adapters;
  } else {
    plan.chunk_rows = rows_per_chunk(args.dtype, args.rows, args.cols);
    plan.chunks = ceil_div(args.rows, plan.chunk_rows);
  }
  if (args.grad_scale == nullptr || args.cols <= 0 || plan.chunks <= 1 || plan.adapters <= 0) return plan;
  plan.bytes = reduction_bytes(args.cols, plan.adapters, plan.chunks);
  return plan;
}

template <typename T, int kSize, int kActivation>
ia3_status run(Backward& p, ia3_stream stream) {
  const auto kernel = p.call.up != nullptr ? activation_bwd_kernel<T, kSize, kActivation, true>
                                           : activation_bwd_kernel<T, kSize, kActivation, false>;
  if (const ia3_status status = count_strips(p.call.cols, kSize, p.given.chunks, p.strips); status != IA3_OK)
    return status;
  return launch(kernel, dim3(unsigned(p.strips * p.given.chunks)), dim3(kLanes, kWarps), p, stream);
}

ia3_status check_adapters(const ia3_activation_backward_args& args) {
  if (args.chunks == nullptr) {
    if (args.scale.scale == nullptr || args.scale.index == nullptr) return IA3_OK;
    return fail(IA3_INVALID,
                "scale has an index and there are no chunks; expected the rows of each adapter as chunks.");
  }
  const ia3_chunks& chunks = *args.chunks;
  if (chunks.chunks < 0 || args.scale.adapters < 1)
    return fail(IA3_INVALID, "there are %lld chunks and %d adapters; expected 0 and 1 at least.",
                static_cast<long long>(chunks.chunks), int(args.scale.adapters));
  const bool is_complete = chunks.order != nullptr && chunks.first != nullptr && chunks.last != nullptr &&
                           chunks.adapter != nullptr && chunks.adapter_first != nullptr &&
                           chunks.adapter_last != nullptr;
  if (chunks.chunks > 0 && !is_complete) return fail(IA3_INVALID, "chunks hold a null pointer; expected six arrays.");
  return IA3_OK;
}

ia3_status check(const ia3_activation_backward_args& args) {
  const void* up = args.up == nullptr ? args.gate : args.up;
  if (args.grad_up != nullptr && args.up == nullptr)
    return fail(IA3_INVALID, "grad_up is given and up is null; expected both or neither.");
  return last_failure({check_adapters(args), check_activation(args.activation),
                       check_matrix({"up", up, args.up_stride}, args.rows, args.cols, false),
                       check_matrix({"gate", args.gate, args.gate_stride}, args.rows, args.cols, false),
                       check_matrix({"grad", args.grad, args.grad_stride}, args.rows, args.cols, false),
                       check_dtype(args.dtype), check_sizes(args.rows, args.cols)});
}

}  // namespace
}  // namespace ia3::cuda

size_t ia3_cuda_activation_backward_workspace(const ia3_activation_backward_args* args) {
  const ia3::cuda::Plan plan = ia3::cuda::plan_for(*args);
  return plan.bytes.arrivals + plan.bytes.partials;
}

ia3_status ia3_cuda_activation_backward(const ia3_activation_backward_args* args, ia3_stream stream) {
  using namespace ia3::cuda;
  if (const ia3_status status = check(*args); status != IA3_OK) return status;
  const Plan plan = plan_for(*args);
  if (args->cols == 0) return IA3_OK;
  if (args->rows == 0 || plan.chunks == 0) {
    if (args->grad_scale == nullptr) return IA3_OK;
    return checked(cudaMemsetAsync(args->grad_scale, 0, size_t(plan.adapters * args->cols) * sizeof(float), stream));
  }
  Backward p{};
  p.call = *args;
  if (args->chunks != nullptr) p.given = *args->chunks;
  p.given.chunks = plan.chunks;
  p.chunk_rows = plan.chunk_rows;
  p.adapters = plan.adapters;
  const ia3_status prepared = prepare_reduction(plan.bytes, args->workspace, stream, p.arrivals, p.partials);
  if (prepared != IA3_OK) return prepared;
  return visit_dtype(args->dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = args->cols % kWide<T> == 0 && is_on_16_bytes(args->scale.scale) &&
                         is_on_16_bytes(args->grad_gate) && is_on_16_bytes(args->grad_up) &&
                         are_rows_on_16_bytes(sizeof(T), {{"grad", args->grad, args->grad_stride},
                                                          {"gate", args->gate, args->gate_stride},
                                                          {"up", args->up, args->up_stride}});
    if (!is_wide) return run<T, 1, -1>(p, stream);
    return visit_activation(args->activation,
                            [&](auto activation) { return run<T, kWide<T>, activation()>(p, stream); });
  });
}
