// Scaling whose undoing is bit-exact; docs/exact-merging.md has the proof.
//
// w' = round(w l) is a monotonic function of w that at most two weights share, neighbours among the patterns, wherever
// both w and w' are normal numbers. So the lowest bit of w, its parity, tells which of them it was:
//
//   merge    w' = round(w l),  parity = w & 1
//   unmerge  n = w' (1 / l) towards zero,  w = n + ((n ^ parity) & 1):  the next pattern of that parity
//
// Merging unmerges at once, in registers, and gives every weight that does not come back (subnormals, overflow, NaN,
// l = 0 ...) to the caller, an `Escape` each.
//
// merge_exact: 2b + 1/8 bytes an element of size b; 2 multiplications, and some 20 integer operations on a block.
// unmerge_exact: 2b + 1/8 bytes; 1 multiplication. stays_finite: b bytes; 1 multiplication.
#pragma once

#include "arguments.h"
#include "patterns.h"

namespace ia3::IA3_ISA {

// Calls body(w, s, r, parity, count, position) for every block of rows [row_begin, row_end): `count` weights from that
// position on, their scales and inverses, and where their parity is. The last block of a row may be shorter than a
// block, and is in a buffer then, with zeros behind it.
template <typename T, bool kWrites, typename Body>
inline void for_each_block(const ExactScaleArgs& args, int64_t row_begin, int64_t row_end, Body body) {
  using P = Patterns<T>;
  using Inverse = typename P::Inverse;
  const int64_t cols = args.cols, whole = cols - cols % P::kSize, rest = cols - whole;
  for (int64_t row = row_begin; row < row_end; ++row) {
    T* w = static_cast<T*>(args.weight) + row * args.stride;
    uint8_t* parity = args.parity + row * ((cols + 7) / 8);
    const int64_t position = row * cols, offset = args.by_row ? row : row / args.rows_per_group * cols;
    const float* scale = args.scale + offset;
    const Inverse* inverse = static_cast<const Inverse*>(args.inverse) + offset;
    T last[P::kSize] = {};
    for (int64_t i = 0; i < rest; ++i) last[i] = w[whole + i];
    if (args.by_row) {
      const auto s = P::all(*scale);
      const auto r = P::all(*inverse);
      for (int64_t i = 0; i < whole; i += P::kSize) {
        prefetch_ahead(w + i);
        body(w + i, s, r, parity + i / 8, P::kSize, position + i);
      }
      if (rest != 0) body(last, s, r, parity + whole / 8, rest, position + whole);
    } else {
      for (int64_t i = 0; i < whole; i += P::kSize) {
        prefetch_ahead(w + i);
        body(w + i, P::factors(scale + i), P::factors(inverse + i), parity + i / 8, P::kSize, position + i);
      }
      if (rest != 0) {
        float last_scale[P::kSize] = {};
        Inverse last_inverse[P::kSize] = {};
        for (int64_t i = 0; i < rest; ++i) {
          last_scale[i] = scale[whole + i];
          last_inverse[i] = inverse[whole + i];
        }
        body(last, P::factors(last_scale), P::factors(last_inverse), parity + whole / 8, rest, position + whole);
      }
    }
    if constexpr (kWrites) {
      for (int64_t i = 0; i < rest; ++i) w[whole + i] = last[i];
    }
  }
}

// Rows [row_begin, row_end); returns how many escapes it wrote, in ascending order. `escapes` has room for one of every
// weight of these rows.
template <typename T>
int64_t merge_exact_kernel(const ExactScaleArgs& args, int64_t row_begin, int64_t row_end, Escape* escapes) {
  using P = Patterns<T>;
  Escape* next = escapes;
  for_each_block<T, true>(args, row_begin, row_end,
                          [&](T* w, const auto& s, const auto& r, uint8_t* parity, int64_t count, int64_t position) {
                            const auto before = P::load(w);
                            const auto after = P::scaled(before, s);
                            const auto back = P::step(P::unscaled(after, r), before);
                            P::store(w, after);
                            const uint32_t bits = P::low_bits(before);
                            for (int64_t i = 0; i < (count + 7) / 8; ++i) parity[i] = uint8_t(bits >> 8 * i);
                            // A NaN's pattern after arithmetic differs between processors, so none may count as undone.
                            const uint32_t wrong = P::differs(back, before) | P::is_nan(after);
                            if (wrong == 0) return;
                            T originals[P::kSize];
                            P::store(originals, before);
                            for (int64_t i = 0; i < count; ++i) {
                              if (wrong >> i & 1) *next++ = {position + i, pattern_bits(originals[i])};
                            }
                          });
  return next - escapes;
}

// Rows [row_begin, row_end), but for the escapes
template <typename T>
void unmerge_exact_kernel(const ExactScaleArgs& args, int64_t row_begin, int64_t row_end) {
  using P = Patterns<T>;
  for_each_block<T, true>(args, row_begin, row_end,
                          [&](T* w, const auto&, const auto& r, const uint8_t* parity, int64_t count, int64_t) {
                            uint32_t bits = 0;
                            for (int64_t i = 0; i < (count + 7) / 8; ++i) bits |= uint32_t(parity[i]) << 8 * i;
                            P::store(w, P::step(P::unscaled(P::load(w), r), P::lanes(typename P::Mask(bits))));
                          });
}

// Whether rows [row_begin, row_end) would be finite if they were scaled; reads b bytes an element, and writes nothing.
template <typename T>
bool stays_finite_kernel(const ExactScaleArgs& args, int64_t row_begin, int64_t row_end) {
  using P = Patterns<T>;
  uint32_t unbounded = 0;
  for_each_block<T, false>(args, row_begin, row_end,
                           [&](const T* w, const auto& s, const auto&, const uint8_t*, int64_t count, int64_t) {
                             const uint32_t valid = uint32_t((uint64_t(1) << count) - 1);
                             unbounded |= P::is_unbounded(P::scaled(P::load(w), s)) & valid;
                           });
  return unbounded == 0;
}

}  // namespace ia3::IA3_ISA
