// Activation functions: value(x), and both(x) giving the value and the derivative from shared parts.
#pragma once

#include "math.h"

namespace ia3::IA3_ISA {

struct Both {
  Vec value;
  Vec derivative;
};

// x sigmoid(z) and its derivative sigmoid(z) + x z' sigmoid(z) (1 - sigmoid(z)), with a finite `slope` = z'
template <Precision kPrecision>
inline Both times_sigmoid(Vec x, Vec z, Vec slope) {
  const Logistic l = logistic<kPrecision>(z);
  const Vec value = x * l.sigmoid;
  return {value, fma(value, slope * l.complement, l.sigmoid)};
}

// x sigmoid(x)
template <Precision kPrecision>
struct Silu {
  static Vec value(Vec x) { return x * logistic<kPrecision>(x).sigmoid; }
  static Both both(Vec x) { return times_sigmoid<kPrecision>(x, x, broadcast(1.0f)); }
};

// x Phi(x)
template <Precision kPrecision>
struct Gelu {
  static Vec value(Vec x) {
    Vec cdf, gaussian;
    normal<kPrecision>(x, cdf, gaussian);
    return x * cdf;
  }
  static Both both(Vec x) {
    // act' = Phi(x) + x phi(x)
    Vec cdf, gaussian;
    normal<kPrecision>(x, cdf, gaussian);
    return {x * cdf, fma(x * broadcast(0.398942280f), gaussian, cdf)};
  }
};

// x (1 + tanh(c (x + 0.044715 x^3))) / 2 = x sigmoid(2 c (x + 0.044715 x^3)), c = sqrt(2 / pi)
template <Precision kPrecision>
struct GeluTanh {
  static constexpr float kLinear = 1.59576912f;   // 2 c
  static constexpr float kCubic = 0.0713548163f;  // 2 c 0.044715
  static Vec argument(Vec x) { return x * fma(x * x, broadcast(kCubic), broadcast(kLinear)); }
  static Vec value(Vec x) { return x * logistic<kPrecision>(argument(x)).sigmoid; }
  static Both both(Vec x) {
    const Vec slope = fma(x * x, broadcast(3.0f * kCubic), broadcast(kLinear));
    return times_sigmoid<kPrecision>(x, argument(x), min(broadcast(1e30f), slope));
  }
};

template <Precision>
struct Relu {
  static Vec value(Vec x) { return max(broadcast(0.0f), x); }
  static Both both(Vec x) { return {value(x), where_not_positive(x, broadcast(0.0f), broadcast(1.0f))}; }
};

// relu(x)^2
template <Precision>
struct Relu2 {
  static Vec value(Vec x) {
    const Vec positive = max(broadcast(0.0f), x);
    return positive * positive;
  }
  static Both both(Vec x) {
    const Vec positive = max(broadcast(0.0f), x);
    return {positive * positive, positive + positive};
  }
};

template <Precision>
struct Identity {
  static Vec value(Vec x) { return x; }
  static Both both(Vec x) { return {x, broadcast(1.0f)}; }
};

}  // namespace ia3::IA3_ISA
