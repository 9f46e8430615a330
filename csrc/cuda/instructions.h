// What a thread does in one instruction: wide loads and stores, conversions of two neighbours. Each has a plain
// version, with which the kernels run on the host in tests.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../core/types.h"

#if !defined(IA3_SHARED)
// A variable of a block's shared memory
#define IA3_SHARED(type, name) __shared__ type name
#endif

namespace ia3::cuda {

// --- 32-bit pieces, holding one fp32 or two 16-bit values ---------------------------------------------------------

__device__ __forceinline__ float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return bits_to_float(bits);
#endif
}

__device__ __forceinline__ uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return float_to_bits(value);
#endif
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }
__device__ __forceinline__ float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return to_float(value);
#endif
}

// To nearest even; NaN stays NaN. The last argument only selects the type.
__device__ __forceinline__ uint32_t round_pair(float low, float high, BFloat16) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return from_float<BFloat16>(low).bits | uint32_t(from_float<BFloat16>(high).bits) << 16;
#endif
}
__device__ __forceinline__ uint32_t round_pair(float low, float high, Float16) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return from_float<Float16>(low).bits | uint32_t(from_float<Float16>(high).bits) << 16;
#endif
}

__device__ __forceinline__ float rounded(float value, float) { return value; }
template <typename T>
__device__ __forceinline__ T rounded(float value, T type) {
  return {uint16_t(round_pair(value, 0.0f, type))};
}

// --- vectors of elements ------------------------------------------------------------------------------------------

template <typename Wide>
__device__ __forceinline__ Wide load_wide(const void* from) {
#if !defined(__CUDACC__)
  emulator::check_alignment(from, sizeof(Wide));
#endif
  return *static_cast<const Wide*>(from);
}

// In one instruction: behind a branch, nvcc takes the assignment of a uint4 apart.
__device__ __forceinline__ void store_16_bytes(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
#elif !defined(__CUDACC__)
  emulator::check_alignment(to, sizeof(uint4));
  *static_cast<uint4*>(to) = {a, b, c, d};
#endif
}

// kSize elements as they lie in memory: 16 bytes, or one element
template <typename T, int kSize>
struct Elements;

template <typename T>
struct Elements<T, 1> {
  T value;
  __device__ __forceinline__ void load(const T* from) { value = *from; }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
  __device__ __forceinline__ void widen(float (&out)[1]) const { out[0] = cuda::widen(value); }
  __device__ __forceinline__ void round(const float (&in)[1]) { value = rounded(in[0], T{}); }
};

template <>
struct Elements<float, 4> {
  float4 bits;
  __device__ __forceinline__ void load(const float* from) { bits = load_wide<float4>(from); }
  __device__ __forceinline__ void store(float* to) const {
    store_16_bytes(to, as_bits(bits.x), as_bits(bits.y), as_bits(bits.z), as_bits(bits.w));
  }
  __device__ __forceinline__ void widen(float (&out)[4]) const {
    out[0] = bits.x, out[1] = bits.y, out[2] = bits.z, out[3] = bits.w;
  }
  __device__ __forceinline__ void round(const float (&in)[4]) { bits = {in[0], in[1], in[2], in[3]}; }
};

template <typename T>
struct Elements<T, 8> {
  uint4 bits;
  __device__ __forceinline__ void load(const T* from) { bits = load_wide<uint4>(from); }
  __device__ __forceinline__ void store(T* to) const { store_16_bytes(to, bits.x, bits.y, bits.z, bits.w); }
  __device__ __forceinline__ void widen(float (&out)[8]) const {
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = cuda::widen(T{uint16_t(pairs[i])});
      out[2 * i + 1] = cuda::widen(T{uint16_t(pairs[i] >> 16)});
    }
  }
  __device__ __forceinline__ void round(const float (&in)[8]) {
    bits = {round_pair(in[0], in[1], T{}), round_pair(in[2], in[3], T{}), round_pair(in[4], in[5], T{}),
            round_pair(in[6], in[7], T{})};
  }
};

// Elements in 16 bytes
template <typename T>
constexpr int kWide = 16 / int(sizeof(T));

template <int kSize>
__device__ __forceinline__ void load_floats(const float* from, float (&out)[kSize]) {
  if constexpr (kSize == 1) {
    out[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 part = load_wide<float4>(from + i);
      out[i] = part.x, out[i + 1] = part.y, out[i + 2] = part.z, out[i + 3] = part.w;
    }
  }
}

// What another block wrote: past the first-level cache, which may hold what was there before.
template <int kSize>
__device__ __forceinline__ void load_shared_floats(const float* from, float (&out)[kSize]) {
  if constexpr (kSize == 1) {
    out[0] = __ldcg(from);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 part = __ldcg(reinterpret_cast<const float4*>(from + i));
      out[i] = part.x, out[i + 1] = part.y, out[i + 2] = part.z, out[i + 3] = part.w;
    }
  }
}

}  // namespace ia3::cuda
