// Exponential, logistic function and normal distribution on vectors, in two precisions.
//
// kFull errs by a few units in the last place of fp32; kApproximate by less than 2^-13, an eighth of bf16's rounding,
// and is for values that a bf16 store rounds anyway. Coefficients: tools/fit_polynomials.py.
#pragma once

#include "vec.h"

namespace ia3::IA3_ISA {

enum class Precision { kFull, kApproximate };

template <int kCount>
inline Vec polynomial(const float (&coefficients)[kCount], Vec x) {
  Vec value = broadcast(coefficients[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) value = fma(value, x, broadcast(coefficients[i]));
  return value;
}

constexpr float kLog2E = 1.44269504088896341f;

// e^x, saturating to 0 and infinity; NaN stays NaN
template <Precision kPrecision>
inline Vec exp(Vec x) {
  if constexpr (kPrecision == Precision::kApproximate) {
    // e^x = 2^n 2^f, with n + f = x log2(e) and |f| <= 1/2
    static constexpr float kExp2[] = {1.0f, 0.693121016f, 0.240223497f, 0.0559219755f, 0.00966636837f};
    const Vec t = min(broadcast(250.0f), max(broadcast(-250.0f), x * broadcast(kLog2E)));
    const Vec n = round_even(t);
    return scale_by_power(polynomial(kExp2, t - n), n);
  } else {
    // e^x = 2^n e^r, with r = x - n ln(2) in two steps so that r keeps its low bits
    static constexpr float kExp[] = {1.0f, 1.0f, 0.5f, 0.166664153f, 0.0416663513f, 0.00837513246f, 0.00139411166f};
    const Vec clamped = min(broadcast(173.0f), max(broadcast(-173.0f), x));
    const Vec n = round_even(clamped * broadcast(kLog2E));
    const Vec r = fma(n, broadcast(-1.42860682e-6f), fma(n, broadcast(-0.693145752f), clamped));
    // In Horner's last two steps 1 + (r + r^2 q) rounds less than ((q r + 1) r + 1).
    Vec q = broadcast(kExp[6]);
    for (int i = 5; i >= 2; --i) q = fma(q, r, broadcast(kExp[i]));
    return scale_by_power(fma(q, r * r, r) + broadcast(1.0f), n);
  }
}

template <Precision kPrecision>
inline Vec reciprocal(Vec x) {
  if constexpr (kPrecision == Precision::kApproximate) return reciprocal_estimate(x);
  return broadcast(1.0f) / x;
}

// sigmoid(x), and 1 - sigmoid(x) as a product that cancels nothing
struct Logistic {
  Vec sigmoid, complement;
};

template <Precision kPrecision>
inline Logistic logistic(Vec x) {
  // Below -88 e stays finite and sigmoid counts as 0, so that its product with any finite x is -0, as in the limit.
  const Vec one = broadcast(1.0f);
  const Vec e = exp<kPrecision>(min(broadcast(88.0f), broadcast(0.0f) - x));
  const Vec d = one + e;
  Vec sigmoid = reciprocal<kPrecision>(d);
  if constexpr (kPrecision == Precision::kFull) {
    // One Newton step takes back what the sum (`lost`, by Knuth's two-sum) and the division rounded away.
    const Vec rest = d - one;
    const Vec lost = (one - (d - rest)) + (e - rest);
    sigmoid = fma(sigmoid, fma(broadcast(0.0f) - d, sigmoid, one) - lost * sigmoid, sigmoid);
  }
  sigmoid = where_negative(x + broadcast(88.0f), broadcast(0.0f), sigmoid);
  return {sigmoid, e * sigmoid};
}

// The standard normal distribution: cdf = Phi(x), and gaussian = exp(-x^2 / 2), which Phi needs anyway
template <Precision kPrecision>
inline void normal(Vec x, Vec& cdf, Vec& gaussian) {
  static constexpr float kTailFull[] = {0.131636232f, 0.131994784f,  0.113927424f,  0.107005723f,  -0.00937896036f,
                                        0.128768519f, -0.142375529f, 0.0224733073f, 0.0248752683f, -0.00892675482f};
  static constexpr float kTailApproximate[] = {0.131469697f,  0.133751795f, 0.11025732f,
                                               0.0886639133f, 0.091136232f, -0.0552851595f};
  // Phi(-t) = exp(-t^2 / 2) y P(y), y = 1 / (1 + 0.33 t), for t >= 0: no cancellation in the lower tail
  gaussian = exp<kPrecision>(x * x * broadcast(-0.5f));
  const Vec y = reciprocal<kPrecision>(fma(abs(x), broadcast(0.33f), broadcast(1.0f)));
  Vec tail;
  if constexpr (kPrecision == Precision::kApproximate) {
    tail = gaussian * y * polynomial(kTailApproximate, y);
  } else {
    tail = gaussian * y * polynomial(kTailFull, y);
  }
  cdf = where_negative(x, tail, broadcast(1.0f) - tail);
}

}  // namespace ia3::IA3_ISA
