/* The CUDA kernels of ia3_kernels behind plain C: raw device pointers, sizes in elements, a stream. No torch.
 *
 * Every function returns at once, after putting its work on the stream; it neither allocates nor synchronizes, so it
 * may be captured into a CUDA graph. The current device must be the one that the pointers and the stream belong to.
 * Rows are `*_stride` elements apart and dense inside. Arithmetic is fp32 with one rounding at the end; the same
 * arguments give the same bits. On any status but IA3_OK nothing was launched, but for IA3_CUDA_ERROR, which the launch
 * itself returned. Structures are to be zeroed before use: fields may be added at their ends. */
#ifndef IA3_KERNELS_H
#define IA3_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define IA3_EXPORT __attribute__((visibility("default")))
#elif defined(_WIN32)
#define IA3_EXPORT __declspec(dllexport)
#else
#define IA3_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st* ia3_stream; /* a cudaStream_t */

typedef enum { IA3_FLOAT32 = 0, IA3_BFLOAT16 = 1, IA3_FLOAT16 = 2 } ia3_dtype;

typedef enum {
  IA3_SILU = 0,
  IA3_GELU = 1,
  IA3_GELU_TANH = 2,
  IA3_RELU = 3,
  IA3_RELU2 = 4,
  IA3_IDENTITY = 5
} ia3_activation;

typedef enum {
  IA3_OK = 0,
  IA3_INVALID = 1, /* an argument no kernel could take: a negative size, a missing pointer, an unknown type */
  IA3_UNSUPPORTED =
      2, /* this kernel does not take these sizes, strides or this device; another one, or a library, does */
  IA3_CUDA_ERROR = 3 /* the CUDA runtime refused the launch; cudaGetLastError() was left as it is */
} ia3_status;

/* A sentence about the last status other than IA3_OK that this thread was given. */
IA3_EXPORT const char* ia3_last_error(void);

/* Compute capabilities with machine code in this library, times ten, ascending, ended by 0; PTX of the last one. */
IA3_EXPORT const int* ia3_cuda_architectures(void);

/* A hash of the sources that the kernels were built from, by which measurements know what they measured. */
IA3_EXPORT const char* ia3_cuda_sources(void);

/* Whether work that is put on the stream is captured into a CUDA graph instead of run; 0 where the runtime cannot say.
 */
IA3_EXPORT int ia3_cuda_is_capturing(ia3_stream stream);

/* Which scale each row takes: `scale` itself, or the row of it that `index` names; ones for -1. Any other index outside
 * of [0, adapters) reads nothing and makes the row NaN. */
typedef struct {
  const float* scale;   /* [n], or [adapters, n]; null: ones */
  const int32_t* index; /* [rows]; null: every row takes `scale` */
  int32_t adapters;     /* read only where `index` is given */
} ia3_scale;

/* h = act(g) u s; with `up` null, h = act(g) s. `out` may be `gate` or `up`. Bytes an element of size b: 3 b, 2 b. */
typedef struct {
  ia3_dtype dtype;
  ia3_activation activation;
  int64_t rows, cols;
  const void* gate; /* [rows, cols] */
  int64_t gate_stride;
  const void* up; /* [rows, cols], or null */
  int64_t up_stride;
  ia3_scale scale;
  void* out; /* [rows, cols] */
  int64_t out_stride;
} ia3_activation_args;

IA3_EXPORT ia3_status ia3_cuda_activation(const ia3_activation_args* args, ia3_stream stream);

/* Rows put in an order in which those of one adapter are adjacent, and cut into chunks that never span two adapters.
 * The chunks of adapter a are those from adapter_first[a] up to, not including, adapter_last[a]. */
typedef struct {
  const int32_t* order;   /* [rows] */
  const int32_t* first;   /* [chunks]: where in `order` the chunk begins */
  const int32_t* last;    /* [chunks]: and where it ends, not included */
  const int32_t* adapter; /* [chunks]: its adapter; -1 for none, -2 for rows of a wrong index, which come out NaN */
  const int32_t* adapter_first; /* [adapters] */
  const int32_t* adapter_last;  /* [adapters] */
  int64_t chunks;
} ia3_chunks;

/* dg = dh s u act'(g), du = dh s act(g), ds = sum over rows of dh act(g) u, in one launch. Null results are not
 * computed. ds is summed in two stages, of which the second runs in the block that finishes a column last, always in
 * the same order. Bytes an element: 5 b gated, 3 b plain. */
typedef struct {
  ia3_dtype dtype;
  ia3_activation activation;
  int64_t rows, cols;
  const void* grad; /* [rows, cols] */
  int64_t grad_stride;
  const void* gate;
  int64_t gate_stride;
  const void* up; /* or null */
  int64_t up_stride;
  ia3_scale scale;          /* with `chunks`, its `index` is not read */
  const ia3_chunks* chunks; /* null: no adapters; rows are cut as they come */
  void* grad_gate;          /* [rows, cols], contiguous, or null */
  void* grad_up;            /* [rows, cols], contiguous, or null */
  float* grad_scale;        /* [cols], or [adapters, cols]; or null */
  void* workspace;          /* ia3_cuda_activation_backward_workspace() bytes, 16-byte aligned; not read where 0 */
} ia3_activation_backward_args;

/* Bytes of workspace for these arguments, whose pointers are not read except for being null; the workspace need not be
 * initialized and is free again when the stream has passed the call. */
IA3_EXPORT size_t ia3_cuda_activation_backward_workspace(const ia3_activation_backward_args* args);
IA3_EXPORT ia3_status ia3_cuda_activation_backward(const ia3_activation_backward_args* args, ia3_stream stream);

/* a = x s_a and b = x s_b: one input on its way into two layers with a scale each, read once. 3 b bytes an element. */
typedef struct {
  ia3_dtype dtype;
  int64_t rows, cols;
  const void* x; /* [rows, cols] */
  int64_t x_stride;
  const float* scales[2]; /* s_a and s_b, [cols] */
  void* out[2];           /* a and b, [rows, cols], contiguous */
} ia3_scale_pair_args;

IA3_EXPORT ia3_status ia3_cuda_scale_pair(const ia3_scale_pair_args* args, ia3_stream stream);

/* dx = da s_a + db s_b, ds_a = sum over rows of da x, ds_b likewise, in one launch, summed as above. Null results are
 * not computed; what only they need is not read, and may be null. 4 b bytes an element. */
typedef struct {
  ia3_dtype dtype;
  int64_t rows, cols;
  const void* grads[2]; /* da and db, [rows, cols] */
  int64_t grad_strides[2];
  const void* x; /* [rows, cols] */
  int64_t x_stride;
  const float* scales[2]; /* s_a and s_b, [cols] */
  void* grad_x;           /* [rows, cols], contiguous, or null */
  float* grad_scales[2];  /* [cols], or null */
  void* workspace;        /* ia3_cuda_scale_pair_backward_workspace() bytes, 16-byte aligned; not read where 0 */
} ia3_scale_pair_backward_args;

/* As ia3_cuda_activation_backward_workspace() */
IA3_EXPORT size_t ia3_cuda_scale_pair_backward_workspace(const ia3_scale_pair_backward_args* args);
IA3_EXPORT ia3_status ia3_cuda_scale_pair_backward(const ia3_scale_pair_backward_args* args, ia3_stream stream);

/* W <- diag(s) W (row_scale given) or W diag(s) (col_scale given), in place; exactly one is given. 2 b bytes a weight.
 */
typedef struct {
  ia3_dtype dtype;
  int64_t rows, cols;
  void* weight; /* [rows, cols] */
  int64_t weight_stride;
  const float* row_scale; /* [rows], or null */
  const float* col_scale; /* [cols], or null */
} ia3_scale_weight_args;

IA3_EXPORT ia3_status ia3_cuda_scale_weight(const ia3_scale_weight_args* args, ia3_stream stream);

/* What ia3_cuda_exact_scale does: */
typedef enum {
  IA3_EXACT_MOVE = 0,      /* old_scale out of the weight, new_scale into it; units with escapes are only counted */
  IA3_EXACT_COLLECT = 1,   /* the same in the units that were only counted; their escapes are written */
  IA3_EXACT_TAKE_BACK = 2, /* old_scale out of all other units, and new_scale into them */
  IA3_EXACT_CHECK = 3      /* nothing to the weight: looks whether it would be finite with new_scale */
} ia3_exact_mode;

/* Scaling in place such that it can be undone, as docs/exact-merging.md has it: merging (old_scale null), unmerging
 * (new_scale null), or both in one pass. Bytes a weight of size b: 2 b + 1/8; a check reads b. A unit is 256 columns of
 * a row, from a multiple of 256 on. A weight whose parity is not enough is an escape; a unit that holds some stays as
 * it is, until there is memory for them, or none and the rest is taken back, by calls with the same workspace. */
typedef struct {
  ia3_dtype dtype;
  ia3_exact_mode mode;
  int64_t rows, cols;
  void* weight; /* [rows, cols] */
  int64_t weight_stride;
  const float* old_scale;   /* what it holds: [rows], or [groups, cols]; or null */
  const float* new_scale;   /* what it is to hold, likewise */
  int scales_rows;          /* whether the scales are [rows] */
  int64_t rows_per_group;   /* of those that share a scale of columns; else `rows` */
  uint8_t* parity;          /* [rows, ceil(cols / 8)], lowest bits first; written where old_scale is null, else read */
  const int64_t* positions; /* [escapes]: of the old scale's, ascending, row * cols + column */
  const void* bits;         /* [escapes]: their patterns, of the weight's size */
  int64_t escapes;
  /* 8 bytes and then 2 for each unit, [rows, ceil(cols / 256)], on 8 bytes; null where nothing is put in, and there are
   * no escapes. After a move: how many escapes there are in all, as a uint64, and in each unit, as int16. After a
   * check, its first byte: 1 if all is finite, else 0. */
  int16_t* workspace;
  const int64_t* offsets; /* to collect: for each unit, how many escapes there are up to its end */
  int64_t* new_positions; /* [all escapes of the new scale] */
  void* new_bits;         /* likewise */
} ia3_exact_scale_args;

IA3_EXPORT ia3_status ia3_cuda_exact_scale(const ia3_exact_scale_args* args, ia3_stream stream);

/* y = (x W^T + b) s on Hopper's tensor cores: bf16 and fp16, every row on 16 bytes. IA3_UNSUPPORTED elsewhere. */
typedef struct {
  ia3_dtype dtype;
  int64_t rows, in, out;
  const void* x; /* [rows, in] */
  int64_t x_stride;
  const void* weight; /* [out, in] */
  int64_t weight_stride;
  const void* bias;   /* [out], or null */
  const float* scale; /* [out], or null */
  void* y;            /* [rows, out] */
  int64_t y_stride;
  int tile; /* which of ia3_cuda_hopper_tiles(), from 0 */
} ia3_hopper_linear_args;

/* The names of the tiles that were built, ended by null: rows x outputs x inputs of a tile, and its schedule. */
IA3_EXPORT const char* const* ia3_cuda_hopper_tiles(void);
IA3_EXPORT ia3_status ia3_cuda_hopper_linear(const ia3_hopper_linear_args* args, ia3_stream stream);

#ifdef __cplusplus
}
#endif

#endif
