// Scalar arithmetic of the kernels that run a thread an element: activations, and how sums over rows are cut.
//
// The same source compiles for the device and for the host, where it is tested. `T` is the type that results will be
// rounded to: fp32 gets every bit, from IEEE operations that are the same in both places; for 16 bits the device's
// approximate exponential and reciprocal, good to 2^-20, disappear behind that rounding. Coefficients: math.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "arguments.h"
#include "types.h"

#if defined(__CUDACC__)
#define IA3_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IA3_HOST_DEVICE inline
#endif

namespace ia3::elementwise {

// --- functions ----------------------------------------------------------------------------------------------------

// 2^n for n within [-126, 127]
IA3_HOST_DEVICE float power_of_two(int n) {
#if defined(__CUDA_ARCH__)
  return __int_as_float((n + 127) << 23);
#else
  return bits_to_float(uint32_t(n + 127) << 23);
#endif
}

// Coefficients from the lowest degree up
template <typename... Higher>
IA3_HOST_DEVICE float polynomial(float x, float lowest, Higher... higher) {
  if constexpr (sizeof...(higher) == 0) {
    return lowest;
  } else {
    return fmaf(polynomial(x, higher...), x, lowest);
  }
}

// e^x, saturating. A NaN may come out as a number: what the functions below return is a product with x itself.
template <typename T>
IA3_HOST_DEVICE float exponential(float x) {
  constexpr float kLog2E = 1.44269504f;
  if constexpr (sizeof(T) == 4) {
    // e^x = 2^n e^r, with r = x - n ln(2) in two steps so that r keeps its low bits, and 2^n in two factors, since it
    // leaves the range of fp32 before e^x does
    const float clamped = fminf(173.0f, fmaxf(-173.0f, x));
    const float n = rintf(clamped * kLog2E);
    const float r = fmaf(n, -1.42860682e-6f, fmaf(n, -0.693145752f, clamped));
    const float q = polynomial(r, 0.5f, 0.166664153f, 0.0416663513f, 0.00837513246f, 0.00139411166f);
    const int half = int(n) / 2;
    return (fmaf(q, r * r, r) + 1.0f) * power_of_two(half) * power_of_two(int(n) - half);
  } else {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2E));
    return y;
#else
    return exp2f(x * kLog2E);
#endif
  }
}

template <typename T>
IA3_HOST_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#endif
  return 1.0f / x;
}

// sigmoid(x), and 1 - sigmoid(x) as a product that cancels nothing
struct Logistic {
  float sigmoid, complement;
};

template <typename T>
IA3_HOST_DEVICE Logistic logistic(float x) {
  // Below -88 e stays finite and sigmoid counts as 0, so that its product with any finite x is -0, as in the limit.
  const float e = exponential<T>(fminf(88.0f, -x));
  const float d = 1.0f + e;
  float sigmoid = reciprocal<T>(d);
  if constexpr (sizeof(T) == 4) {
    // One Newton step takes back what the sum (`lost`, by Knuth's two-sum) and the division rounded away.
    const float rest = d - 1.0f;
    const float lost = (1.0f - (d - rest)) + (e - rest);
    sigmoid = fmaf(sigmoid, fmaf(-d, sigmoid, 1.0f) - lost * sigmoid, sigmoid);
  }
  if (x < -88.0f) sigmoid = 0.0f;
  return {sigmoid, e * sigmoid};
}

// The standard normal distribution: cdf = Phi(x), and gaussian = exp(-x^2 / 2), which Phi needs anyway
struct Normal {
  float cdf, gaussian;
};

template <typename T>
IA3_HOST_DEVICE Normal normal(float x) {
  // Phi(-t) = exp(-t^2 / 2) y P(y), y = 1 / (1 + 0.33 t), for t >= 0: no cancellation in the lower tail
  const float gaussian = exponential<T>(x * x * -0.5f);
  const float y = reciprocal<T>(fmaf(fabsf(x), 0.33f, 1.0f));
  float p;
  if constexpr (std::is_same_v<T, BFloat16>) {
    p = polynomial(y, 0.131469697f, 0.133751795f, 0.11025732f, 0.0886639133f, 0.091136232f, -0.0552851595f);
  } else {
    p = polynomial(y, 0.131636232f, 0.131994784f, 0.113927424f, 0.107005723f, -0.00937896036f, 0.128768519f,
                   -0.142375529f, 0.0224733073f, 0.0248752683f, -0.00892675482f);
  }
  const float tail = gaussian * y * p;
  return {x < 0.0f ? tail : 1.0f - tail, gaussian};
}

// --- activations --------------------------------------------------------------------------------------------------

struct Both {
  float value, derivative;
};

// x sigmoid(z) and its derivative sigmoid(z) + x z' sigmoid(z) (1 - sigmoid(z)), with a finite `slope` = z'
template <typename T>
IA3_HOST_DEVICE Both times_sigmoid(float x, float z, float slope) {
  const Logistic l = logistic<T>(z);
  const float value = x * l.sigmoid;
  return {value, fmaf(value, slope * l.complement, l.sigmoid)};
}

// act(x) and act'(x). Where only one of them is used, compilers drop the other's arithmetic; where `activation` is a
// constant, they drop the switch.
template <typename T>
IA3_HOST_DEVICE Both activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu:  // x sigmoid(x)
      return times_sigmoid<T>(x, x, 1.0f);
    case Activation::kGelu: {  // x Phi(x); act' = Phi(x) + x phi(x)
      const Normal n = normal<T>(x);
      return {x * n.cdf, fmaf(x * 0.398942280f, n.gaussian, n.cdf)};
    }
    case Activation::kGeluTanh: {
      // x (1 + tanh(c (x + 0.044715 x^3))) / 2 = x sigmoid(2 c (x + 0.044715 x^3)), c = sqrt(2 / pi)
      constexpr float kLinear = 1.59576912f;   // 2 c
      constexpr float kCubic = 0.0713548163f;  // 2 c 0.044715
      const float slope = fminf(1e30f, fmaf(x * x, 3.0f * kCubic, kLinear));
      return times_sigmoid<T>(x, x * fmaf(x * x, kCubic, kLinear), slope);
    }
    case Activation::kRelu:  // the comparisons keep a NaN
      return {x < 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
    case Activation::kRelu2: {
      const float positive = x < 0.0f ? 0.0f : x;
      return {positive * positive, positive + positive};
    }
    case Activation::kIdentity:
      break;
  }
  return {x, 1.0f};
}

// --- sums over rows -----------------------------------------------------------------------------------------------

// A running sum that carries its rounding error along (Kahan): as good as a pairwise one, in two registers.
struct Sum {
  float total = 0.0f, lost = 0.0f;

  IA3_HOST_DEVICE void add(float term) {
    const float addend = term - lost;
    const float after = total + addend;
    lost = (after - total) - addend;
    total = after;
  }
};

// Rows that a block sums, where columns are cut into `strips`: powers of two, so that some 1000 to 2000 blocks fill any
// device and the second stage stays short. A function of the shape alone, so that a sum's bits are, too.
inline int64_t rows_per_chunk(int64_t rows, int64_t strips) {
  constexpr int64_t kFewest = 16, kBlocks = 2048;
  int64_t chunk = kFewest;
  while ((rows + chunk - 1) / chunk > kFewest && (rows + chunk - 1) / chunk * strips > kBlocks) chunk *= 2;
  return chunk;
}

}  // namespace ia3::elementwise
