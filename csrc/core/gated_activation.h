// h = act(g) u s and its backward, for gated (u given) and plain (u absent) feed-forward layers.
//
// Memory-bound. Bytes an element of size b: forward reads g, u and writes h, 3b (plain: 2b); backward reads dh, g, u
// and writes dg, du, 5b (plain: 3b), and recomputes act(g), so that h is never kept. The scale and the partial sums of
// ds stay in cache.
#pragma once

#include <type_traits>

#include "activations.h"
#include "arguments.h"
#include "row_sums.h"

namespace ia3::IA3_ISA {

// bf16 results hide the approximate functions' error; fp16's eleven bits would not.
template <typename T>
constexpr Precision kPrecisionFor = std::is_same_v<T, BFloat16> ? Precision::kApproximate : Precision::kFull;

template <typename T, typename Act, bool kGated>
void gated_activation_fwd_kernel(const ActivationArgs& args, int64_t row_begin, int64_t row_end, int64_t col_begin,
                                 int64_t col_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* g = static_cast<const T*>(args.gate) + r * args.gate_stride;
    const T* u = kGated ? static_cast<const T*>(args.up) + r * args.up_stride : nullptr;
    const float* s = scale_of_row(args.scales, r);
    T* h = static_cast<T*>(args.out) + r * args.out_stride;
    for_each_vector(col_begin, col_end, [=](int64_t i, auto n) {
      Vec value = Act::value(load(g + i, n));
      if constexpr (kGated) value = value * load(u + i, n);
      store(h + i, value * load(s + i, n), n);
    });
  }
}

// `rows` lists the rows to visit (null: row_begin .. row_end themselves), which all take the scale `s`. `partial`, if
// not null, is [cols]: overwritten with this call's share of ds. `lost` is scratch for it, [col_end - col_begin].
template <typename T, typename Act, bool kGated>
void gated_activation_bwd_kernel(const ActivationGradArgs& args, const int64_t* rows, const float* s, float* partial,
                                 float* lost, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  for (int64_t position = row_begin; position < row_end; ++position) {
    const int64_t r = rows == nullptr ? position : rows[position];
    const T* dh = static_cast<const T*>(args.grad) + r * args.grad_stride;
    const T* g = static_cast<const T*>(args.gate) + r * args.gate_stride;
    const T* u = kGated ? static_cast<const T*>(args.up) + r * args.up_stride : nullptr;
    T* dg = args.grad_gate == nullptr ? nullptr : static_cast<T*>(args.grad_gate) + r * args.cols;
    T* du = args.grad_up == nullptr ? nullptr : static_cast<T*>(args.grad_up) + r * args.cols;
    const bool first = position == row_begin;
    for_each_vector(col_begin, col_end, [=](int64_t i, auto n) {
      const Vec grad = load(dh + i, n);
      const Both act = Act::both(load(g + i, n));
      const Vec scaled = grad * load(s + i, n);
      Vec slope = scaled * act.derivative;
      Vec hidden = act.value;
      if constexpr (kGated) {
        const Vec up = load(u + i, n);
        slope = slope * up;
        hidden = hidden * up;
        if (du != nullptr) store(du + i, scaled * act.value, n);
      }
      if (dg != nullptr) store(dg + i, slope, n);
      if (partial != nullptr) add_to_row_sum<T>(partial + i, lost + (i - col_begin), grad * hidden, first, n);
    });
  }
}

// Calls visitor.template operator()<Act, kGated>() for the runtime choice.
template <typename T, template <Precision> class Act, typename Visitor>
void visit_gated(bool gated, Visitor visitor) {
  if (gated) return visitor.template operator()<Act<kPrecisionFor<T>>, true>();
  return visitor.template operator()<Act<kPrecisionFor<T>>, false>();
}

template <typename T, typename Visitor>
void visit_activation(Activation activation, bool gated, Visitor visitor) {
  switch (activation) {
    case Activation::kSilu:
      return visit_gated<T, Silu>(gated, visitor);
    case Activation::kGelu:
      return visit_gated<T, Gelu>(gated, visitor);
    case Activation::kGeluTanh:
      return visit_gated<T, GeluTanh>(gated, visitor);
    case Activation::kRelu:
      return visit_gated<T, Relu>(gated, visitor);
    case Activation::kRelu2:
      return visit_gated<T, Relu2>(gated, visitor);
    case Activation::kIdentity:
      return visit_gated<T, Identity>(gated, visitor);
  }
}

}  // namespace ia3::IA3_ISA
