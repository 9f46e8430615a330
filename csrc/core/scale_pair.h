// a = x s_a and b = x s_b, one input on its way into two layers with a scale each, and its backward.
//
// Memory-bound. Bytes an element of size b: forward reads x and writes a and b, 3b; backward reads da, db, x and writes
// dx, 4b. The scales and the partial sums of ds_a and ds_b stay in cache.
#pragma once

#include "arguments.h"
#include "row_sums.h"
#include "vec.h"

namespace ia3::IA3_ISA {

template <typename T>
void scale_pair_fwd_kernel(const ScalePairArgs& args, int64_t row_begin, int64_t row_end, int64_t col_begin,
                           int64_t col_end) {
  const float* s_a = args.scales[0];
  const float* s_b = args.scales[1];
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
    T* a = static_cast<T*>(args.out[0]) + r * args.cols;
    T* b = static_cast<T*>(args.out[1]) + r * args.cols;
    for_each_vector(col_begin, col_end, [=](int64_t i, auto n) {
      const Vec value = load(x + i, n);
      store_exact(a + i, value * load(s_a + i, n), n);
      store_exact(b + i, value * load(s_b + i, n), n);
    });
  }
}

// `partials`, where they are not null, are [cols]: overwritten with this call's share of ds_a and ds_b. `lost` is
// scratch for both, [2, col_end - col_begin]. kWantsAll: nothing is null, which training asks for, and which takes no
// decisions in the inner loop.
template <typename T, bool kWantsAll>
void scale_pair_bwd_kernel(const ScalePairGradArgs& args, float* const (&partials)[2], float* lost, int64_t row_begin,
                           int64_t row_end, int64_t col_begin, int64_t col_end) {
  const float* s_a = args.scales[0];
  const float* s_b = args.scales[1];
  float* const sum_a = partials[0];
  float* const sum_b = partials[1];
  const bool wants_x = kWantsAll || args.grad_x != nullptr;
  const bool wants_a = kWantsAll || sum_a != nullptr, wants_b = kWantsAll || sum_b != nullptr;
  const int64_t width = col_end - col_begin;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const auto row = [r](auto* matrix, int64_t stride) { return matrix == nullptr ? nullptr : matrix + r * stride; };
    const T* da = row(static_cast<const T*>(args.grads[0]), args.grad_strides[0]);
    const T* db = row(static_cast<const T*>(args.grads[1]), args.grad_strides[1]);
    const T* x = row(static_cast<const T*>(args.x), args.x_stride);
    T* dx = row(static_cast<T*>(args.grad_x), args.cols);
    const bool first = r == row_begin;
    for_each_vector(col_begin, col_end, [=](int64_t i, auto n) {
      const Vec grad_a = wants_x || wants_a ? load(da + i, n) : broadcast(0.0f);
      const Vec grad_b = wants_x || wants_b ? load(db + i, n) : broadcast(0.0f);
      const Vec value = wants_a || wants_b ? load(x + i, n) : broadcast(0.0f);
      // dx = da s_a + db s_b ; ds_a += da x ; ds_b += db x
      if (wants_x) store_exact(dx + i, grad_a * load(s_a + i, n) + grad_b * load(s_b + i, n), n);
      float* const loss = lost + (i - col_begin);
      if (wants_a) add_to_row_sum<T>(sum_a + i, loss, grad_a * value, first, n);
      if (wants_b) add_to_row_sum<T>(sum_b + i, loss + width, grad_b * value, first, n);
    });
  }
}

}  // namespace ia3::IA3_ISA
