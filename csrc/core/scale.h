// Scaling, widening and rounding of matrices.
//
// scale_weight: W <- diag(s) W or W diag(s) in place; reads and writes each weight once, 2b bytes an element of size b.
// widen: 16 bits -> fp32, with the input scale, ahead of an fp32 matmul; 2 + 4 bytes an element.
// narrow: the matmul's epilogue on fp32 sums that are still in cache: bias, output scale, one rounding; 4 + b bytes.
#pragma once

#include "arguments.h"
#include "vec.h"

namespace ia3::IA3_ISA {

// Rows [row_begin, row_end) of the stored matrix; exactly one of row_scale [rows] and col_scale [cols] is given.
template <typename T>
void scale_weight_kernel(T* weight, int64_t stride, int64_t cols, const float* row_scale, const float* col_scale,
                         int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    T* w = weight + r * stride;
    if (row_scale != nullptr) {
      const Vec s = broadcast(row_scale[r]);
      for_each_vector(0, cols, [=](int64_t i, auto n) {
        prefetch_ahead(w + i);
        store_exact(w + i, load(w + i, n) * s, n);
      });
    } else {
      for_each_vector(0, cols, [=](int64_t i, auto n) {
        prefetch_ahead(w + i);
        store_exact(w + i, load(w + i, n) * load(col_scale + i, n), n);
      });
    }
  }
}

// out [rows, cols] <- x (s), fp32; `out` is contiguous
template <typename T>
void widen_kernel(const T* x, int64_t stride, int64_t cols, const RowScales* scales, float* out, int64_t row_begin,
                  int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* from = x + r * stride;
    float* to = out + r * cols;
    if (scales != nullptr) {
      const float* s = scale_of_row(*scales, r);
      for_each_vector(0, cols, [=](int64_t i, auto n) { store(to + i, load(from + i, n) * load(s + i, n), n); });
    } else {
      for_each_vector(0, cols, [=](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
    }
  }
}

// y[r, col_offset + i] <- (sums[r, i] + b) s, rounded once. `sums` may be `y` itself when T is float.
template <typename T>
void narrow_kernel(const float* sums, int64_t sums_stride, int64_t cols, int64_t col_offset, const T* bias,
                   const RowScales* scales, T* y, int64_t y_stride, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const float* from = sums + r * sums_stride;
    const T* b = bias == nullptr ? nullptr : bias + col_offset;
    const float* s = scales == nullptr ? nullptr : scale_of_row(*scales, r) + col_offset;
    T* to = y + r * y_stride + col_offset;
    for_each_vector(0, cols, [=](int64_t i, auto n) {
      Vec value = load(from + i, n);
      if (b != nullptr) value = value + load(b + i, n);
      if (s != nullptr) value = value * load(s + i, n);
      store_exact(to + i, value, n);
    });
  }
}

}  // namespace ia3::IA3_ISA
