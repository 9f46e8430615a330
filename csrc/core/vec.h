// One vector of fp32 lanes, for the instruction set that this translation unit is compiled for.
//
// Kernels are written once against this interface and compiled once per instruction set; IA3_ISA is the namespace that
// keeps the copies apart, so everything that a kernel inlines must live inside it. Loads widen any element type to
// fp32, stores round it to nearest even. `n` counts the lanes that a partial load or store touches; other lanes load as
// zero.
#pragma once

#include <cmath>
#include <cstdint>

#include "types.h"

#if defined(IA3_USE_AVX512) || defined(IA3_USE_AVX2)
#include <immintrin.h>
#endif

#ifndef IA3_ISA
#error "IA3_ISA must name the namespace of the instruction set"
#endif

// Before a loop of few constant iterations whose vectors must stay in registers
#define IA3_UNROLL _Pragma("GCC unroll 32")

namespace ia3::IA3_ISA {

#if defined(IA3_USE_AVX512)

struct Vec {
  static constexpr int64_t kSize = 16;
  __m512 v;
};

inline __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1u); }

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }

inline Vec widen_bf16(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
inline Vec load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const BFloat16* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline Vec load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load(const Float16* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }

// The rounded pattern is the upper half of each lane. Exact also for subnormals, which the bf16 conversion instruction
// flushes to zero.
inline __m512i rounded_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));  // quiet
}

inline __m256i round_bf16_exact(Vec x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bf16(x), 16)); }

inline __m256i round_bf16(Vec x) {
#if defined(IA3_USE_AVX512_BF16)
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  return round_bf16_exact(x);
#endif
}

inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
inline void store(BFloat16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(x)); }
inline void store(BFloat16* p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), round_bf16(x)); }
inline void store(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(Float16* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_exact(BFloat16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16_exact(x)); }
inline void store_exact(BFloat16* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), round_bf16_exact(x));
}

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max and min return the second operand where either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec round_even(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n within [-250, 250]
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Within 2^-14 of 1 / a
inline Vec reciprocal_estimate(Vec a) { return {_mm512_rcp14_ps(a.v)}; }
inline Vec where_negative(Vec x, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), no.v, yes.v)};
}
inline Vec where_not_positive(Vec x, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LE_OQ), no.v, yes.v)};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
// The sums of four vectors, to out[0 .. 3]
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  // Pairs, then quarters: after two rounds each 128-bit lane holds one partial sum of a, b, c and d.
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 all = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(IA3_USE_AVX2)

struct Vec {
  static constexpr int64_t kSize = 8;
  __m256 v;
};

inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// 16-bit lanes have no masked moves: partial ones go through a buffer.
template <typename T>
inline __m128i load_partial_16(const T* p, int64_t n) {
  alignas(16) T buffer[8] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
template <typename T>
inline void store_partial_16(T* p, __m128i x, int64_t n) {
  alignas(16) T buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }

inline Vec widen_bf16(__m128i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))}; }
inline Vec load(const BFloat16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const BFloat16* p, int64_t n) { return widen_bf16(load_partial_16(p, n)); }
inline Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const Float16* p, int64_t n) { return {_mm256_cvtph_ps(load_partial_16(p, n))}; }

// The rounded pattern is the upper half of each lane.
inline __m256i rounded_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
}

inline __m128i round_bf16(Vec x) {
  const __m256i high = _mm256_srli_epi32(rounded_bf16(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(float* p, Vec x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x.v); }
inline void store(BFloat16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_bf16(x)); }
inline void store(BFloat16* p, Vec x, int64_t n) { store_partial_16(p, round_bf16(x), n); }
inline void store(Float16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(Float16* p, Vec x, int64_t n) {
  store_partial_16(p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT), n);
}

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec round_even(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline Vec scale_by_power(Vec a, Vec n) {
  // In two factors, since 2^n alone leaves the fp32 range before a * 2^n does.
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256 partly = _mm256_mul_ps(a.v, power_of_two(half));
  return {_mm256_mul_ps(partly, power_of_two(_mm256_sub_epi32(whole, half)))};
}
inline Vec reciprocal_estimate(Vec a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)}; }
inline Vec where_negative(Vec x, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
}
inline Vec where_not_positive(Vec x, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LE_OQ))};
}
inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

#else  // plain C++, which compilers vectorize for whatever the target has

struct Vec {
  static constexpr int64_t kSize = 8;
  float v[kSize];
};

template <typename Function>
inline Vec map(Function function) {
  Vec result;
  for (int64_t i = 0; i < Vec::kSize; ++i) result.v[i] = function(i);
  return result;
}

inline Vec broadcast(float x) {
  return map([&](int64_t) { return x; });
}
template <typename T>
inline Vec load(const T* p) {
  return map([&](int64_t i) { return to_float(p[i]); });
}
template <typename T>
inline Vec load(const T* p, int64_t n) {
  return map([&](int64_t i) { return i < n ? to_float(p[i]) : 0.0f; });
}
template <typename T>
inline void store(T* p, Vec x, int64_t n = Vec::kSize) {
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(x.v[i]);
}
inline Vec operator+(Vec a, Vec b) {
  return map([&](int64_t i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return map([&](int64_t i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return map([&](int64_t i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return map([&](int64_t i) { return a.v[i] / b.v[i]; });
}
// Two roundings: without the instruction, a true fma is a slow library call.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) {
  return map([&](int64_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return map([&](int64_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec abs(Vec a) {
  return map([&](int64_t i) { return std::fabs(a.v[i]); });
}
inline Vec round_even(Vec a) {
  // Adding and taking away 1.5 * 2^23 leaves the nearest integer, for |a| < 2^22.
  return map([&](int64_t i) { return (a.v[i] + 12582912.0f) - 12582912.0f; });
}
inline Vec scale_by_power(Vec a, Vec n) {
  return map([&](int64_t i) {
    // The clamp keeps a NaN's conversion to int defined; a NaN in `a` still comes through.
    const int32_t whole = n.v[i] >= -250.0f && n.v[i] <= 250.0f ? int32_t(n.v[i]) : 0;
    const int32_t half = whole >> 1;
    return a.v[i] * bits_to_float(uint32_t(half + 127) << 23) * bits_to_float(uint32_t(whole - half + 127) << 23);
  });
}
inline Vec reciprocal_estimate(Vec a) { return broadcast(1.0f) / a; }
inline Vec where_negative(Vec x, Vec yes, Vec no) {
  return map([&](int64_t i) { return x.v[i] < 0.0f ? yes.v[i] : no.v[i]; });
}
inline Vec where_not_positive(Vec x, Vec yes, Vec no) {
  return map([&](int64_t i) { return x.v[i] <= 0.0f ? yes.v[i] : no.v[i]; });
}
inline float sum(Vec a) { return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7])); }
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
}

#endif

#if !defined(IA3_USE_AVX512)
// Only the AVX-512 conversion instruction flushes subnormals; every other store is exact already.
inline void store_exact(BFloat16* p, Vec x) { store(p, x); }
inline void store_exact(BFloat16* p, Vec x, int64_t n) { store(p, x, n); }
#endif
template <typename T>
inline void store_exact(T* p, Vec x) {
  store(p, x);
}
template <typename T>
inline void store_exact(T* p, Vec x, int64_t n) {
  store(p, x, n);
}

// For a kernel that reads a matrix once, from memory: asks for the line that it will reach in a hundred iterations. On
// its own a processor looks no further ahead than the end of the page.
inline void prefetch_ahead(const void* p) {
  constexpr int64_t kBytes = 4096;
  __builtin_prefetch(static_cast<const char*>(p) + kBytes);
}

// Calls body(column, width) over [begin, end): whole vectors with `width` the type FullWidth, then one partial vector.
struct FullWidth {};
template <typename T>
inline Vec load(const T* p, FullWidth) {
  return load(p);
}
template <typename T>
inline void store(T* p, Vec x, FullWidth) {
  store(p, x);
}
template <typename T>
inline void store_exact(T* p, Vec x, FullWidth) {
  store_exact(p, x);
}
template <typename Body>
inline void for_each_vector(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + Vec::kSize <= end; i += Vec::kSize) body(i, FullWidth{});
  if (i < end) body(i, end - i);
}

}  // namespace ia3::IA3_ISA
