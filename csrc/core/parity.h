// Exact merging, a weight at a time: what csrc/core/patterns.h does to whole registers, and csrc/cuda/exact_scale.cu to
// what a thread holds. docs/exact-merging.md has the proof.
#pragma once

#include <cmath>
#include <cstdint>

#include "types.h"

namespace ia3 {

// from + ((from ^ like) & 1), in every lane of which `ones` has the lowest bit: the next pattern of like's parity. In
// lanes of 16 bits the sum must not carry, which one alone does: 0xffff, a NaN that no conversion here gives.
static constexpr uint32_t next_of_parity(uint32_t from, uint32_t like, uint32_t ones) {
  return from + ((from ^ like) & ones);
}

// The pattern of x rounded to T, to nearest even or towards zero
static inline uint32_t pattern_of(float x, BFloat16) { return round_to(x, BFloat16{}).bits; }
static inline uint32_t pattern_of(float x, Float16) { return round_to(x, Float16{}).bits; }
static inline uint32_t pattern_of(float x, float) { return float_to_bits(x); }
static inline uint32_t towards_zero(float x, BFloat16) { return float_to_bits(x) >> 16; }
static inline uint32_t towards_zero(float x, Float16) {
  const Float16 nearest = round_to(x, Float16{});
  return nearest.bits - uint32_t(std::fabs(to_float(nearest)) > std::fabs(x));
}
static inline uint32_t towards_zero(double x, float) {
  const float nearest = float(x);
  return float_to_bits(nearest) - uint32_t(std::fabs(double(nearest)) > std::fabs(x));
}
static inline float value_of(uint32_t pattern, BFloat16) { return to_float(BFloat16{uint16_t(pattern)}); }
static inline float value_of(uint32_t pattern, Float16) { return to_float(Float16{uint16_t(pattern)}); }
static inline float value_of(uint32_t pattern, float) { return bits_to_float(pattern); }

}  // namespace ia3
