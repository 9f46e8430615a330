// The operands of the blocked matmul as its inner loop reads them: fp32, one after the other.
//
// A panel holds kLanes outputs of W over a block of inputs, [depth][kLanes]: what one step of the loop needs is one
// line of it. W stored [out, in] is transposed on the way, 32 bits at a time, so that 16-bit weights move in pairs and
// widen afterwards. Some 0.3 instructions a weight, each used for rows / kSize multiply-adds.
#pragma once

#include "vec.h"

namespace ia3::IA3_ISA {

constexpr int64_t kLanes = 2 * Vec::kSize;
// Inputs of a block: a panel takes a third of a first-level cache, and leaves room for the rows that pass by it.
constexpr int64_t kDepth = 128;

// A Unit is one integer register, 32 bits a lane: an fp32 weight, or two of 16 bits, of which `low` comes first.
#if defined(IA3_USE_AVX512)

using Unit = __m512i;

inline Unit load_unit(const void* p) { return _mm512_loadu_si512(p); }
inline Vec low_bf16(Unit u) { return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))}; }
inline Vec high_bf16(Unit u) { return {_mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000))))}; }
inline Vec low_fp16(Unit u) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(u))}; }
inline Vec high_fp16(Unit u) { return low_fp16(_mm512_srli_epi32(u, 16)); }
inline Vec as_fp32(Unit u) { return {_mm512_castsi512_ps(u)}; }

// Lane i of unit j becomes lane j of unit i.
inline void transpose(Unit (&u)[Vec::kSize]) {
  Unit t[16];
  // Pairs, then quadruples of rows, within 128 bits: part q of u[4 g + j] is column 4 q + j of rows 4 g to 4 g + 3
  IA3_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(u[i], u[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(u[i], u[i + 1]);
  }
  IA3_UNROLL for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Then the 4 x 4 parts of 128 bits
  IA3_UNROLL for (int j = 0; j < 4; ++j) {
    const Unit a = u[j], b = u[4 + j], c = u[8 + j], d = u[12 + j];
    const Unit even_ab = _mm512_shuffle_i32x4(a, b, 0x88), odd_ab = _mm512_shuffle_i32x4(a, b, 0xdd);
    const Unit even_cd = _mm512_shuffle_i32x4(c, d, 0x88), odd_cd = _mm512_shuffle_i32x4(c, d, 0xdd);
    t[j] = _mm512_shuffle_i32x4(even_ab, even_cd, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_ab, even_cd, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0xdd);
  }
  IA3_UNROLL for (int i = 0; i < 16; ++i) u[i] = t[i];
}

#elif defined(IA3_USE_AVX2)

using Unit = __m256i;

inline Unit load_unit(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Vec low_bf16(Unit u) { return {_mm256_castsi256_ps(_mm256_slli_epi32(u, 16))}; }
inline Vec high_bf16(Unit u) { return {_mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(int(0xffff0000))))}; }
inline Vec high_fp16(Unit u) {
  const Unit high = _mm256_srli_epi32(u, 16);
  return {_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)))};
}
inline Vec low_fp16(Unit u) { return high_fp16(_mm256_slli_epi32(u, 16)); }
inline Vec as_fp32(Unit u) { return {_mm256_castsi256_ps(u)}; }

inline void transpose(Unit (&u)[Vec::kSize]) {
  Unit t[8];
  IA3_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(u[i], u[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(u[i], u[i + 1]);
  }
  IA3_UNROLL for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  IA3_UNROLL for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2x128_si256(u[j], u[4 + j], 0x20);
    t[4 + j] = _mm256_permute2x128_si256(u[j], u[4 + j], 0x31);
  }
  IA3_UNROLL for (int i = 0; i < 8; ++i) u[i] = t[i];
}

#endif

#if defined(IA3_USE_AVX512) || defined(IA3_USE_AVX2)

// Stores a unit's elements, of inputs k and (16 bits) k + 1, to lines of a panel.
inline void store_unit(const float*, Unit u, float* to) { store(to, as_fp32(u)); }
inline void store_unit(const BFloat16*, Unit u, float* to) {
  store(to, low_bf16(u));
  store(to + kLanes, high_bf16(u));
}
inline void store_unit(const Float16*, Unit u, float* to) {
  store(to, low_fp16(u));
  store(to + kLanes, high_fp16(u));
}

// kSize whole rows of W, from one register's width of inputs
template <typename T>
inline void transpose_block(const T* w, int64_t stride, float* panel) {
  constexpr int64_t kEach = 4 / sizeof(T);
  Unit units[Vec::kSize];
  IA3_UNROLL for (int i = 0; i < Vec::kSize; ++i) {
    // The row's line after the next: the hardware sees short rows, not a stream.
    __builtin_prefetch(w + i * stride + 2 * kEach * Vec::kSize);
    units[i] = load_unit(w + i * stride);
  }
  transpose(units);
  IA3_UNROLL for (int i = 0; i < Vec::kSize; ++i) store_unit(w, units[i], panel + i * kEach * kLanes);
}

#endif

// Outputs [0, lanes) of W stored [out, in], inputs [0, depth); lanes that are not there become zeros.
template <typename T>
void pack_panel(const T* w, int64_t stride, int64_t lanes, int64_t depth, float* panel) {
  for (int64_t first = 0; first < kLanes; first += Vec::kSize) {
    int64_t k = 0;
#if defined(IA3_USE_AVX512) || defined(IA3_USE_AVX2)
    constexpr int64_t kStep = 4 / sizeof(T) * Vec::kSize;
    if (first + Vec::kSize <= lanes) {
      for (; k + kStep <= depth; k += kStep)
        transpose_block(w + first * stride + k, stride, panel + k * kLanes + first);
    }
#endif
    for (; k < depth; ++k) {
      for (int64_t i = first; i < first + Vec::kSize; ++i) {
        panel[k * kLanes + i] = i < lanes ? to_float(w[i * stride + k]) : 0.0f;
      }
    }
  }
}

// The same of W stored [in, out]
template <typename T>
void pack_stored_panel(const T* w, int64_t stride, int64_t lanes, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(w + (k + 8) * stride);
    for (int64_t i = 0; i < kLanes; i += Vec::kSize) {
      const int64_t left = lanes - i;
      store(panel + k * kLanes + i, left >= Vec::kSize ? load(w + k * stride + i)
                                    : left > 0         ? load(w + k * stride + i, left)
                                                       : broadcast(0.0f));
    }
  }
}

// Rows of x, scaled and widened, in blocks of kDepth inputs: [ceil(in / kDepth)][rows][kDepth]. Lines of one row are
// kDepth apart, so that the inner loop finds all of its rows from one address.
template <typename T>
void pack_rows_kernel(const T* x, int64_t stride, int64_t in, const RowScales* scales, int64_t rows, float* out,
                      int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* from = x + r * stride;
    const float* s = scales == nullptr ? nullptr : scale_of_row(*scales, r);
    for (int64_t block = 0; block < in; block += kDepth) {
      float* to = out + block * rows + r * kDepth - block;
      for_each_vector(block, in - block < kDepth ? in : block + kDepth, [=](int64_t i, auto n) {
        const Vec value = load(from + i, n);
        store(to + i, s == nullptr ? value : value * load(s + i, n), n);
      });
    }
  }
}

}  // namespace ia3::IA3_ISA
