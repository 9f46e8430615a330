// Element types and their scalar conversions. The vector ones are in vec.h.
//
// The functions are static: this header is compiled for several instruction sets, and a shared inline function would be
// whichever copy the linker met first.
#pragma once

#include <cstdint>
#include <cstring>

namespace ia3 {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// Storage only: all arithmetic is on fp32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline uint32_t pattern_bits(float value) { return float_to_bits(value); }
static inline uint32_t pattern_bits(BFloat16 value) { return value.bits; }
static inline uint32_t pattern_bits(Float16 value) { return value.bits; }

static inline float to_float(float value) { return value; }

static inline float to_float(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

static inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN: widen the exponent's all-ones
    return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  // Placed 112 exponents too low, then scaled up exactly: subnormals come out right without a case of their own.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even; NaN stays NaN. The second argument only selects the type.
static inline float round_to(float value, float) { return value; }

static inline BFloat16 round_to(float value, BFloat16) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

static inline Float16 round_to(float value, Float16) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 2^16 or beyond
  if (magnitude < 0x38800000u) {                                    // subnormal: let an fp32 addition round
    return {uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
}

template <typename T>
static inline T from_float(float value) {
  return round_to(value, T{});
}

}  // namespace ia3
