// The arguments of the kernels: raw pointers, sizes in elements, no ownership. Shared by every instruction set.
#pragma once

#include <cstdint>

#include "types.h"

namespace ia3 {

// In the order of ACTIVATIONS in ia3_kernels/schemas.py
enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kIdentity };

// Which scale each row takes: the one vector, or the row of [A, n] that `index` names, with ones for -1.
struct RowScales {
  const float* scale;    // [n] or [A, n], contiguous
  const float* ones;     // [n]; read only for index -1
  const int32_t* index;  // [rows], or null: every row takes `scale`
  int64_t stride;        // n
};

static inline const float* scale_of_row(const RowScales& scales, int64_t r) {
  if (scales.index == nullptr) return scales.scale;
  return scales.index[r] < 0 ? scales.ones : scales.scale + int64_t(scales.index[r]) * scales.stride;
}

// h = act(g) u s. With `up` null, h = act(g) s.
struct ActivationArgs {
  DType dtype;
  Activation activation;
  const void* gate;
  int64_t gate_stride;  // between rows; elements of a row are adjacent
  const void* up;
  int64_t up_stride;
  RowScales scales;
  void* out;
  int64_t out_stride;
};

// dg = dh s u act'(g), du = dh s act(g), ds = sum over rows of dh act(g) u. Null results are not computed.
struct ActivationGradArgs {
  DType dtype;
  Activation activation;
  const void* grad;
  int64_t grad_stride;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* grad_gate;  // [rows, n], contiguous
  void* grad_up;
  int64_t cols;
};

// a = x s_a, b = x s_b
struct ScalePairArgs {
  DType dtype;
  const void* x;
  int64_t x_stride;        // between rows; elements of a row are adjacent
  const float* scales[2];  // s_a and s_b, [cols]
  void* out[2];            // a and b, [rows, cols], contiguous
  int64_t cols;
};

// dx = da s_a + db s_b, ds_a = sum over rows of da x, ds_b likewise. What only a result needs that is not wanted is not
// read: x where neither sum is, the scales where dx is not.
struct ScalePairGradArgs {
  DType dtype;
  const void* grads[2];  // da and db
  int64_t grad_strides[2];
  const void* x;
  int64_t x_stride;
  const float* scales[2];
  void* grad_x;  // [rows, cols], contiguous; or null
  int64_t cols;
};

// y = ((x s_in) W^T + b) s_out
struct LinearArgs {
  DType dtype;
  const float* x;  // [rows, in], already scaled and widened: contiguous, or packed by pack_rows
  int64_t rows;
  int64_t in;
  int64_t out;
  const void* weight;
  int64_t weight_stride;  // between rows of the stored matrix
  bool transposed;        // the stored matrix is [in, out]
  const void* bias;       // [out] or null
  bool has_scale;
  RowScales scales;
  void* y;        // [rows, out], contiguous
  void* product;  // the same before it is scaled, likewise; or null
};

// W <- diag(l) W, or W diag(l) with an l of its own for every group of rows, such that it can be undone
struct ExactScaleArgs {
  DType dtype;
  void* weight;    // [rows, cols]
  int64_t stride;  // between rows
  int64_t cols;
  const float* scale;      // [rows], or [groups, cols]
  const void* inverse;     // 1 / scale; fp32, for fp32 weights fp64
  bool by_row;             // scale is [rows]
  int64_t rows_per_group;  // where it is not
  uint8_t* parity;         // [rows, ceil(cols / 8)], lowest bits first
};

// A weight that its scaled value and its parity do not give back
struct Escape {
  int64_t position;  // row * cols + column
  uint32_t bits;     // its pattern
};

}  // namespace ia3
