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

// y[r, col + i] <- (sums[r, i] + b) s for i < width, rounded once; where it is asked for, sums + b as well
template <typename T>
void narrow_kernel(const LinearArgs& args, const float* sums, int64_t sums_stride, int64_t col, int64_t width,
                   int64_t row_begin, int64_t row_end) {
  const T* b = args.bias == nullptr ? nullptr : static_cast<const T*>(args.bias) + col;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const float* from = sums + r * sums_stride;
    const float* s = args.has_scale ? scale_of_row(args.scales, r) + col : nullptr;
    T* to = static_cast<T*>(args.y) + r * args.out + col;
    T* product = args.product == nullptr ? nullptr : static_cast<T*>(args.product) + r * args.out + col;
    for_each_vector(0, width, [=](int64_t i, auto n) {
      Vec value = load(from + i, n);
      if (b != nullptr) value = value + load(b + i, n);
      if (product != nullptr) store_exact(product + i, value, n);
      if (s != nullptr) value = value * load(s + i, n);
      store_exact(to + i, value, n);
    });
  }
}

}  // namespace ia3::IA3_ISA
