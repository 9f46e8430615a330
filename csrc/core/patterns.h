// A block of stored weights as their bit patterns, for the instruction set that this translation unit is compiled for.
//
// What exact merging needs besides fp32 lanes: the lowest bits of many weights, patterns compared, one added to some.
// A block fills one integer register, so a block of 16-bit weights widens to two vectors of fp32 lanes. In which order
// the weights go into those two is the type's own affair: a `Factors` has the same order.
//
// Every result here is decided by IEEE arithmetic alone (one multiplication, one rounding), never by an approximation
// or a fused operation: what one machine merges, any other must undo bit-exactly.
#pragma once

#include <type_traits>

#include "parity.h"
#include "vec.h"

namespace ia3::IA3_ISA {

// Patterns<T>: kSize weights of type T. Lane i is weight i, and bit i of a Mask.
//   load, store       whole blocks
//   factors           of fp32 scales (inverses: fp64 for fp32 weights), from memory or one for all lanes
//   scaled            round(w s), to nearest even
//   unscaled          w' r, rounded towards zero: to a pattern at or one below the quotient's
//   step              where two patterns differ in the lowest bit, one is added to the first
//   low_bits, lanes   the lowest bit of every lane as a mask, and back
//   differs           whether two patterns do, as a mask
//   is_nan            a mask
//   is_unbounded      whether it is infinite or NaN, as a mask
template <typename T>
struct Patterns;

#if defined(IA3_USE_AVX512)

struct Patterns16 {
  static constexpr int64_t kSize = 32;
  using Mask = uint32_t;
  using Block = __m512i;
  using Inverse = float;
  struct Factors {
    Vec a, b;
  };
  using Inverses = Factors;

  static Block load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Block w) { _mm512_storeu_si512(p, w); }
  static Factors all(float s) { return {broadcast(s), broadcast(s)}; }
  // from + ((from ^ like) & 1)
  static Block step(Block from, Block like) {
    return _mm512_add_epi16(from, _mm512_ternarylogic_epi32(from, like, _mm512_set1_epi16(1), 0x28));
  }
  static Mask low_bits(Block w) { return _mm512_test_epi16_mask(w, _mm512_set1_epi16(1)); }
  static Block lanes(Mask bits) { return _mm512_maskz_set1_epi16(bits, 1); }
  static Mask differs(Block a, Block b) { return _mm512_cmpneq_epi16_mask(a, b); }
  // Whether the magnitude's pattern is above this one
  static Mask exceeds(Block w, int16_t limit) {
    const Block magnitude = _mm512_and_si512(w, _mm512_set1_epi16(0x7fff));
    return _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(limit));
  }
};

template <>
struct Patterns<BFloat16> : Patterns16 {  // a: the even lanes; b: the odd ones, which need no shift
  static Factors factors(const float* s) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 low = _mm512_loadu_ps(s), high = _mm512_loadu_ps(s + 16);
    return {{_mm512_permutex2var_ps(low, even, high)}, {_mm512_permutex2var_ps(low, odd, high)}};
  }
  static Factors product(Block w, const Factors& s) {
    const __m512i even = _mm512_slli_epi32(w, 16), odd = _mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000)));
    return {Vec{_mm512_castsi512_ps(even)} * s.a, Vec{_mm512_castsi512_ps(odd)} * s.b};
  }
  static Block join(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
  }
  static Block scaled(Block w, const Factors& s) {
    const Factors x = product(w, s);
    return join(rounded_bf16(x.a), rounded_bf16(x.b));
  }
  static Block unscaled(Block w, const Factors& r) {
    const Factors x = product(w, r);
    return join(_mm512_castps_si512(x.a.v), _mm512_castps_si512(x.b.v));
  }
  static Mask is_nan(Block w) { return exceeds(w, 0x7f80); }
  static Mask is_unbounded(Block w) { return exceeds(w, 0x7f7f); }
};

template <>
struct Patterns<Float16> : Patterns16 {  // a: the lower half; b: the upper
  static Factors factors(const float* s) { return {load_vec(s), load_vec(s + 16)}; }
  static Vec load_vec(const float* s) { return IA3_ISA::load(s); }
  static Factors product(Block w, const Factors& s) {
    const Vec a = {_mm512_cvtph_ps(_mm512_castsi512_si256(w))}, b = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1))};
    return {a * s.a, b * s.b};
  }
  template <int kRounding>
  static Block narrow(const Factors& x) {
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(x.a.v, kRounding));
    return _mm512_inserti64x4(low, _mm512_cvtps_ph(x.b.v, kRounding), 1);
  }
  static Block scaled(Block w, const Factors& s) { return narrow<_MM_FROUND_TO_NEAREST_INT>(product(w, s)); }
  static Block unscaled(Block w, const Factors& r) { return narrow<_MM_FROUND_TO_ZERO>(product(w, r)); }
  static Mask is_nan(Block w) { return exceeds(w, 0x7c00); }
  static Mask is_unbounded(Block w) { return exceeds(w, 0x7bff); }
};

template <>
struct Patterns<float> {
  static constexpr int64_t kSize = 16;
  using Mask = uint16_t;
  using Block = __m512i;
  using Inverse = double;
  using Factors = Vec;
  struct Inverses {
    __m512d a, b;
  };

  static Block load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Block w) { _mm512_storeu_si512(p, w); }
  static Factors all(float s) { return broadcast(s); }
  static Inverses all(double r) { return {_mm512_set1_pd(r), _mm512_set1_pd(r)}; }
  static Factors factors(const float* s) { return IA3_ISA::load(s); }
  static Inverses factors(const double* r) { return {_mm512_loadu_pd(r), _mm512_loadu_pd(r + 8)}; }
  static Block scaled(Block w, Factors s) { return _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(w), s.v)); }
  static Block unscaled(Block w, const Inverses& r) {
    constexpr int kRounding = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
    const __m256 low = _mm256_castsi256_ps(_mm512_castsi512_si256(w));
    const __m256 high = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(w, 1));
    const __m256 a = _mm512_cvt_roundpd_ps(_mm512_mul_pd(_mm512_cvtps_pd(low), r.a), kRounding);
    const __m256 b = _mm512_cvt_roundpd_ps(_mm512_mul_pd(_mm512_cvtps_pd(high), r.b), kRounding);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_castps_si256(a)), _mm256_castps_si256(b), 1);
  }
  static Block step(Block from, Block like) {
    return _mm512_add_epi32(from, _mm512_ternarylogic_epi32(from, like, _mm512_set1_epi32(1), 0x28));
  }
  static Mask low_bits(Block w) { return _mm512_test_epi32_mask(w, _mm512_set1_epi32(1)); }
  static Block lanes(Mask bits) { return _mm512_maskz_set1_epi32(bits, 1); }
  static Mask differs(Block a, Block b) { return _mm512_cmpneq_epi32_mask(a, b); }
  static Mask is_nan(Block w) {
    const __m512 x = _mm512_castsi512_ps(w);
    return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  }
  static Mask is_unbounded(Block w) {
    return _mm512_cmpgt_epi32_mask(_mm512_and_si512(w, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f7fffff));
  }
};

#elif defined(IA3_USE_AVX2)

struct Patterns16 {
  static constexpr int64_t kSize = 16;
  using Mask = uint16_t;
  using Block = __m256i;
  using Inverse = float;
  struct Factors {
    Vec a, b;
  };
  using Inverses = Factors;

  static Block load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Block w) { _mm256_storeu_si256(static_cast<__m256i*>(p), w); }
  static Factors all(float s) { return {broadcast(s), broadcast(s)}; }
  static Block step(Block from, Block like) {
    return _mm256_add_epi16(from, _mm256_and_si256(_mm256_xor_si256(from, like), _mm256_set1_epi16(1)));
  }
  // The sign bit of every 16-bit lane
  static Mask signs(Block w) {
    return Mask(_mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1))));
  }
  static Mask low_bits(Block w) { return signs(_mm256_slli_epi16(w, 15)); }
  static Block lanes(Mask bits) {
    const __m256i powers =
        _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, int16_t(0x8000));
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi16(int16_t(bits)), powers);
    return _mm256_srli_epi16(_mm256_cmpeq_epi16(chosen, powers), 15);
  }
  static Mask differs(Block a, Block b) { return Mask(~signs(_mm256_cmpeq_epi16(a, b))); }
  // Whether the magnitude's pattern is above this one
  static Mask exceeds(Block w, int16_t limit) {
    const Block magnitude = _mm256_and_si256(w, _mm256_set1_epi16(0x7fff));
    return signs(_mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(limit)));
  }
};

template <>
struct Patterns<BFloat16> : Patterns16 {  // a: the even lanes; b: the odd ones, which need no shift
  static Factors factors(const float* s) {
    const __m256 low = _mm256_loadu_ps(s), high = _mm256_loadu_ps(s + 8);
    // Shuffles stay within 128 bits; a permutation of 64-bit pairs puts their results in order.
    const auto in_order = [](__m256 x) {
      return Vec{_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8))};
    };
    return {in_order(_mm256_shuffle_ps(low, high, 0x88)), in_order(_mm256_shuffle_ps(low, high, 0xdd))};
  }
  static Factors product(Block w, const Factors& s) {
    const __m256i even = _mm256_slli_epi32(w, 16), odd = _mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000)));
    return {Vec{_mm256_castsi256_ps(even)} * s.a, Vec{_mm256_castsi256_ps(odd)} * s.b};
  }
  static Block join(__m256i even, __m256i odd) { return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa); }
  static Block scaled(Block w, const Factors& s) {
    const Factors x = product(w, s);
    return join(rounded_bf16(x.a), rounded_bf16(x.b));
  }
  static Block unscaled(Block w, const Factors& r) {
    const Factors x = product(w, r);
    return join(_mm256_castps_si256(x.a.v), _mm256_castps_si256(x.b.v));
  }
  static Mask is_nan(Block w) { return exceeds(w, 0x7f80); }
  static Mask is_unbounded(Block w) { return exceeds(w, 0x7f7f); }
};

template <>
struct Patterns<Float16> : Patterns16 {  // a: the lower half; b: the upper
  static Factors factors(const float* s) { return {IA3_ISA::load(s), IA3_ISA::load(s + 8)}; }
  static Factors product(Block w, const Factors& s) {
    const Vec a = {_mm256_cvtph_ps(_mm256_castsi256_si128(w))}, b = {_mm256_cvtph_ps(_mm256_extracti128_si256(w, 1))};
    return {a * s.a, b * s.b};
  }
  template <int kRounding>
  static Block narrow(const Factors& x) {
    return _mm256_set_m128i(_mm256_cvtps_ph(x.b.v, kRounding), _mm256_cvtps_ph(x.a.v, kRounding));
  }
  static Block scaled(Block w, const Factors& s) { return narrow<_MM_FROUND_TO_NEAREST_INT>(product(w, s)); }
  static Block unscaled(Block w, const Factors& r) { return narrow<_MM_FROUND_TO_ZERO>(product(w, r)); }
  static Mask is_nan(Block w) { return exceeds(w, 0x7c00); }
  static Mask is_unbounded(Block w) { return exceeds(w, 0x7bff); }
};

template <>
struct Patterns<float> {
  static constexpr int64_t kSize = 8;
  using Mask = uint8_t;
  using Block = __m256i;
  using Inverse = double;
  using Factors = Vec;
  struct Inverses {
    __m256d a, b;
  };

  static Block load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Block w) { _mm256_storeu_si256(static_cast<__m256i*>(p), w); }
  static Factors all(float s) { return broadcast(s); }
  static Inverses all(double r) { return {_mm256_set1_pd(r), _mm256_set1_pd(r)}; }
  static Factors factors(const float* s) { return IA3_ISA::load(s); }
  static Inverses factors(const double* r) { return {_mm256_loadu_pd(r), _mm256_loadu_pd(r + 4)}; }
  static Block scaled(Block w, Factors s) { return _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(w), s.v)); }
  // There is no conversion towards zero: round to nearest, and take one off where that went away from zero.
  static __m128i towards_zero(__m256d x) {
    const __m128 nearest = _mm256_cvtpd_ps(x);
    const __m256d sign = _mm256_set1_pd(-0.0);
    const __m256d far = _mm256_cmp_pd(_mm256_andnot_pd(sign, _mm256_cvtps_pd(nearest)), _mm256_andnot_pd(sign, x),
                                      _CMP_GT_OQ);  // -1 or 0, as 64-bit integers
    const __m256i low_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    const __m256i minus_one = _mm256_permutevar8x32_epi32(_mm256_castpd_si256(far), low_halves);
    return _mm_add_epi32(_mm_castps_si128(nearest), _mm256_castsi256_si128(minus_one));
  }
  static Block unscaled(Block w, const Inverses& r) {
    const __m256d a = _mm256_cvtps_pd(_mm_castsi128_ps(_mm256_castsi256_si128(w)));
    const __m256d b = _mm256_cvtps_pd(_mm_castsi128_ps(_mm256_extracti128_si256(w, 1)));
    return _mm256_set_m128i(towards_zero(_mm256_mul_pd(b, r.b)), towards_zero(_mm256_mul_pd(a, r.a)));
  }
  static Block step(Block from, Block like) {
    return _mm256_add_epi32(from, _mm256_and_si256(_mm256_xor_si256(from, like), _mm256_set1_epi32(1)));
  }
  static Mask signs(Block w) { return Mask(_mm256_movemask_ps(_mm256_castsi256_ps(w))); }
  static Mask low_bits(Block w) { return signs(_mm256_slli_epi32(w, 31)); }
  static Block lanes(Mask bits) {
    const __m256i powers = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(bits), powers);
    return _mm256_srli_epi32(_mm256_cmpeq_epi32(chosen, powers), 31);
  }
  static Mask differs(Block a, Block b) { return Mask(~signs(_mm256_cmpeq_epi32(a, b))); }
  static Mask is_nan(Block w) {
    const __m256 x = _mm256_castsi256_ps(w);
    return Mask(_mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  }
  static Mask is_unbounded(Block w) {
    return signs(_mm256_cmpgt_epi32(_mm256_and_si256(w, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(0x7f7fffff)));
  }
};

#else  // plain C++

template <typename T>
struct Patterns {
  static constexpr int64_t kSize = 8;
  using Mask = uint8_t;
  using Word = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  using Inverse = std::conditional_t<sizeof(T) == 2, float, double>;
  template <typename Element>
  struct Lanes {
    Element v[kSize];
  };
  using Block = Lanes<Word>;
  using Factors = Lanes<float>;
  using Inverses = Lanes<Inverse>;

  template <typename Element, typename Function>
  static Lanes<Element> map(Function function) {
    Lanes<Element> result;
    for (int64_t i = 0; i < kSize; ++i) result.v[i] = Element(function(i));
    return result;
  }
  template <typename Function>
  static Mask mask(Function function) {
    unsigned bits = 0;
    for (int64_t i = 0; i < kSize; ++i) bits |= unsigned(function(i)) << i;
    return Mask(bits);
  }

  static Block load(const void* p) {
    Block w;
    std::memcpy(&w, p, sizeof(w));
    return w;
  }
  static void store(void* p, Block w) { std::memcpy(p, &w, sizeof(w)); }
  template <typename Element>
  static Lanes<Element> all(Element s) {
    return map<Element>([=](int64_t) { return s; });
  }
  template <typename Element>
  static Lanes<Element> factors(const Element* s) {
    return map<Element>([=](int64_t i) { return s[i]; });
  }
  static Block scaled(const Block& w, const Factors& s) {
    return map<Word>([&](int64_t i) { return pattern_of(value_of(w.v[i], T{}) * s.v[i], T{}); });
  }
  static Block unscaled(const Block& w, const Inverses& r) {
    return map<Word>([&](int64_t i) { return towards_zero(Inverse(value_of(w.v[i], T{})) * r.v[i], T{}); });
  }
  static Block step(const Block& from, const Block& like) {
    return map<Word>([&](int64_t i) { return next_of_parity(from.v[i], like.v[i], 1); });
  }
  static Mask low_bits(const Block& w) {
    return mask([&](int64_t i) { return w.v[i] & 1u; });
  }
  static Block lanes(Mask bits) {
    return map<Word>([=](int64_t i) { return bits >> i & 1; });
  }
  static Mask differs(const Block& a, const Block& b) {
    return mask([&](int64_t i) { return a.v[i] != b.v[i]; });
  }
  static Mask is_nan(const Block& w) {
    return mask([&](int64_t i) { return std::isnan(value_of(w.v[i], T{})); });
  }
  static Mask is_unbounded(const Block& w) {
    return mask([&](int64_t i) { return !std::isfinite(value_of(w.v[i], T{})); });
  }
};

#endif

}  // namespace ia3::IA3_ISA
