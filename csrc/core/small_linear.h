// y = ((x s_in) W^T + b) s_out for few rows (decoding): the weight is streamed once, at the speed of memory.
//
// T rows, N outputs, K inputs: 2 T N K flops over N K b bytes. Below about 16 rows the bytes decide, so W is read where
// it lies, in its own dtype, and widened in registers; x, small and in cache, is widened and scaled beforehand. Sums of
// a strip of outputs collect in fp32 on the stack, then take bias, scale and their one rounding as vectors.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "scale.h"
#include "vec.h"

namespace ia3::IA3_ISA {

// Outputs whose sums collect at a time: rows times strip is at most kSums (64 KiB on the stack).
constexpr int64_t kSums = 16384;
constexpr int64_t kStrip = 256;
// Streaming along the rows of a transposed W wants longer strips, of fewer rows.
constexpr int64_t kTransposedStrip = 1024;
// Rows of x that share a widened weight vector: as many as leave the sums, kRows * 4 of them, in registers
#if defined(IA3_USE_AVX512)
constexpr int kRowsAtOnce = 6;
#else
constexpr int kRowsAtOnce = 2;
#endif

// kRows rows of x against kOutputs rows of W, starting at `w`
template <typename T, int kRows, int kOutputs>
inline void dot_block(const LinearArgs& args, const float* x, const T* w, float* sums, int64_t sums_stride) {
  // One row alone has too few sums in flight to hide the multiply-add's latency: give it two sets.
  constexpr int kSets = kRows * kOutputs <= 4 ? 2 : 1;
  constexpr int64_t kStep = kSets * Vec::kSize;
  Vec totals[kSets][kRows][kOutputs];
  IA3_UNROLL for (int i = 0; i < kSets * kRows * kOutputs; ++i)(&totals[0][0][0])[i] = broadcast(0.0f);
  const int64_t stride = args.weight_stride;
  int64_t k = 0;
  for (; k + kStep <= args.in; k += kStep) {
    IA3_UNROLL for (int set = 0; set < kSets; ++set) {
      const int64_t at = k + set * Vec::kSize;
      Vec weights[kOutputs];
      IA3_UNROLL for (int j = 0; j < kOutputs; ++j) {
        // The next block of W, into the second-level cache: rows are too short for the hardware to see the stream.
        if (at * int64_t(sizeof(T)) % 64 == 0) __builtin_prefetch(w + (kOutputs + j) * stride + at, 0, 2);
        weights[j] = load(w + j * stride + at);
      }
      IA3_UNROLL for (int t = 0; t < kRows; ++t) {
        const Vec values = load(x + t * args.in + at);
        IA3_UNROLL for (int j = 0; j < kOutputs; ++j) totals[set][t][j] = fma(values, weights[j], totals[set][t][j]);
      }
    }
  }
  for (; k < args.in; k += Vec::kSize) {
    const int64_t left = args.in - k < Vec::kSize ? args.in - k : Vec::kSize;
    IA3_UNROLL for (int j = 0; j < kOutputs; ++j) {
      const Vec weight = load(w + j * stride + k, left);
      IA3_UNROLL for (int t = 0; t < kRows; ++t) totals[0][t][j] =
          fma(load(x + t * args.in + k, left), weight, totals[0][t][j]);
    }
  }
  IA3_UNROLL for (int t = 0; t < kRows; ++t) {
    if constexpr (kSets == 2)
      IA3_UNROLL for (int j = 0; j < kOutputs; ++j) totals[0][t][j] = totals[0][t][j] + totals[1][t][j];
    if constexpr (kOutputs == 4) {
      sum4(totals[0][t][0], totals[0][t][1], totals[0][t][2], totals[0][t][3], sums + t * sums_stride);
    } else {
      IA3_UNROLL for (int j = 0; j < kOutputs; ++j) sums[t * sums_stride + j] = sum(totals[0][t][j]);
    }
  }
}

// W stored [in, out], as in a Conv1D: the rows of W stream by, eight at a time, over sums that stay in the first-level
// cache. The eight are summed before they meet the running sum, which so rounds an eighth as often.
template <typename T, int kRows>
inline void axpy_block(const LinearArgs& args, const float* x, const T* weight, int64_t width, float* sums,
                       int64_t stride) {
  for (int t = 0; t < kRows; ++t)
    for (int64_t i = 0; i < width; ++i) sums[t * stride + i] = 0.0f;
  int64_t k = 0;
  const auto accumulate = [&](auto unroll) {
    constexpr int kCount = decltype(unroll)::value;
    const T* w = weight + k * args.weight_stride;
    for_each_vector(0, width, [&](int64_t i, auto n) {
      Vec totals[kRows];
      IA3_UNROLL for (int j = 0; j < kCount; ++j) {
        __builtin_prefetch(w + (kCount + j) * args.weight_stride + i, 0, 2);
        const Vec weights = load(w + j * args.weight_stride + i, n);
        IA3_UNROLL for (int t = 0; t < kRows; ++t) {
          const Vec value = broadcast(x[t * args.in + k + j]);
          totals[t] = j == 0 ? value * weights : fma(value, weights, totals[t]);
        }
      }
      IA3_UNROLL for (int t = 0; t < kRows; ++t) {
        float* sum = sums + t * stride + i;
        store(sum, load(sum, n) + totals[t], n);
      }
    });
  };
  constexpr int kUnroll = 8;
  for (; k + kUnroll <= args.in; k += kUnroll) accumulate(std::integral_constant<int, kUnroll>{});
  for (; k < args.in; ++k) accumulate(std::integral_constant<int, 1>{});
}

template <typename T, int kRows>
inline void block(const LinearArgs& args, const float* x, int64_t n, int64_t width, float* sums, int64_t stride) {
  const T* weight = static_cast<const T*>(args.weight);
  if (args.transposed) return axpy_block<T, kRows>(args, x, weight + n, width, sums, stride);
  weight += n * args.weight_stride;
  int64_t i = 0;
  for (; i + 4 <= width; i += 4) dot_block<T, kRows, 4>(args, x, weight + i * args.weight_stride, sums + i, stride);
  for (; i < width; ++i) dot_block<T, kRows, 1>(args, x, weight + i * args.weight_stride, sums + i, stride);
}

// Outputs [n_begin, n_end) of every row; at most 64 rows, 16 if W is transposed
template <typename T>
void small_linear_fwd_kernel(const LinearArgs& args, int64_t n_begin, int64_t n_end) {
  float sums[kSums];
  // With several groups of rows, the strip is short enough for its weights to wait in cache for the next group.
  const int64_t strip = args.transposed ? kTransposedStrip : args.rows <= kRowsAtOnce ? kStrip : 32;
  for (int64_t n = n_begin; n < n_end; n += strip) {
    const int64_t width = n_end - n < strip ? n_end - n : strip;
    const float* x = args.x;
    float* to = sums;
    int64_t row = 0;
    const auto advance = [&](int rows) {
      row += rows;
      x += rows * args.in;
      to += rows * strip;
    };
    for (; row + kRowsAtOnce <= args.rows; advance(kRowsAtOnce)) block<T, kRowsAtOnce>(args, x, n, width, to, strip);
    for (; kRowsAtOnce > 4 && row + 4 <= args.rows; advance(4)) block<T, 4>(args, x, n, width, to, strip);
    for (; kRowsAtOnce > 2 && row + 2 <= args.rows; advance(2)) block<T, 2>(args, x, n, width, to, strip);
    for (; row < args.rows; advance(1)) block<T, 1>(args, x, n, width, to, strip);
    narrow_kernel<T>(args, sums, strip, n, width, 0, args.rows);
  }
}

}  // namespace ia3::IA3_ISA
