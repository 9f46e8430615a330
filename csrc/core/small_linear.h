// y = ((x s_in) W^T + b) s_out for few rows (decoding): the weight is streamed once, at the speed of memory.
//
// T rows, N outputs, K inputs: 2 T N K flops over N K b bytes. Below about 16 rows the bytes decide, so W is read where
// it lies, in 16 bits, and widened in registers; x, small and in cache, is widened and scaled beforehand.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "vec.h"

namespace ia3::IA3_ISA {

template <typename T>
inline void finish(const SmallLinearArgs& args, int64_t row, int64_t n, float sum) {
  if (args.bias != nullptr) sum += to_float(static_cast<const T*>(args.bias)[n]);
  if (args.has_scale) sum *= scale_of_row(args.scales, row)[n];
  static_cast<T*>(args.y)[row * args.out + n] = from_float<T>(sum);
}

// kRows rows of x against kOutputs rows of W: kRows * kOutputs sums in registers, each weight vector widened once.
template <typename T, int kRows, int kOutputs>
inline void dot_block(const SmallLinearArgs& args, int64_t row, int64_t n) {
  const T* w[kOutputs];
  for (int j = 0; j < kOutputs; ++j) w[j] = static_cast<const T*>(args.weight) + (n + j) * args.weight_stride;
  const float* x = args.x + row * args.in;
  // One row alone has too few sums in flight to hide the multiply-add's latency: give it two sets.
  constexpr int kSets = kRows * kOutputs <= 4 ? 2 : 1;
  Vec sums[kSets][kRows][kOutputs];
  for (auto& set : sums)
    for (auto& line : set)
      for (auto& sum : line) sum = broadcast(0.0f);
  // The next block of W, a whole block of rows ahead: rows are too short for the hardware to see the stream.
  const int64_t ahead = kOutputs * args.weight_stride;
  int64_t k = 0;
  for (; k + kSets * Vec::kSize <= args.in; k += kSets * Vec::kSize) {
    for (int set = 0; set < kSets; ++set) {
      const int64_t at = k + set * Vec::kSize;
      Vec weights[kOutputs];
      for (int j = 0; j < kOutputs; ++j) {
        __builtin_prefetch(w[j] + at + ahead);
        weights[j] = load(w[j] + at);
      }
      for (int t = 0; t < kRows; ++t) {
        const Vec values = load(x + t * args.in + at);
        for (int j = 0; j < kOutputs; ++j) sums[set][t][j] = fma(values, weights[j], sums[set][t][j]);
      }
    }
  }
  for (; k < args.in; k += Vec::kSize) {
    const int64_t left = args.in - k < Vec::kSize ? args.in - k : Vec::kSize;
    for (int j = 0; j < kOutputs; ++j) {
      const Vec weight = load(w[j] + k, left);
      for (int t = 0; t < kRows; ++t) sums[0][t][j] = fma(load(x + t * args.in + k, left), weight, sums[0][t][j]);
    }
  }
  for (int t = 0; t < kRows; ++t) {
    for (int j = 0; j < kOutputs; ++j) {
      Vec total = sums[0][t][j];
      for (int set = 1; set < kSets; ++set) total = total + sums[set][t][j];
      finish<T>(args, row + t, n + j, sum(total));
    }
  }
}

template <typename T, int kOutputs>
inline void dot_rows(const SmallLinearArgs& args, int64_t n) {
  int64_t row = 0;
  for (; row + 4 <= args.rows; row += 4) dot_block<T, 4, kOutputs>(args, row, n);
  if (row + 2 <= args.rows) {
    dot_block<T, 2, kOutputs>(args, row, n);
    row += 2;
  }
  if (row < args.rows) dot_block<T, 1, kOutputs>(args, row, n);
}

// W stored [in, out], as in a Conv1D: sums over a strip of outputs stay in the first-level cache while the rows of W
// stream by, eight at a time. The eight are summed before they meet the running sum, which so rounds an eighth as
// often.
template <typename T, int kRows>
inline void strip_rows(const SmallLinearArgs& args, int64_t row, int64_t n_begin, int64_t n_end, float* sums,
                       int64_t strip) {
  const float* x = args.x + row * args.in;
  const int64_t width = n_end - n_begin;
  for (int t = 0; t < kRows; ++t)
    for (int64_t i = 0; i < width; ++i) sums[t * strip + i] = 0.0f;
  constexpr int kUnroll = 8;
  int64_t k = 0;
  const auto accumulate = [&](auto unroll) {
    constexpr int kCount = decltype(unroll)::value;
    const T* w = static_cast<const T*>(args.weight) + k * args.weight_stride + n_begin;
    for_each_vector(0, width, [&](int64_t i, auto n) {
      Vec totals[kRows];
      for (int j = 0; j < kCount; ++j) {
        const Vec weight = load(w + j * args.weight_stride + i, n);
        for (int t = 0; t < kRows; ++t) {
          const Vec value = broadcast(x[t * args.in + k + j]);
          totals[t] = j == 0 ? value * weight : fma(value, weight, totals[t]);
        }
      }
      for (int t = 0; t < kRows; ++t) {
        float* sum = sums + t * strip + i;
        store(sum, load(sum, n) + totals[t], n);
      }
    });
  };
  for (; k + kUnroll <= args.in; k += kUnroll) accumulate(std::integral_constant<int, kUnroll>{});
  for (; k < args.in; ++k) accumulate(std::integral_constant<int, 1>{});
  for (int t = 0; t < kRows; ++t)
    for (int64_t i = 0; i < width; ++i) finish<T>(args, row + t, n_begin + i, sums[t * strip + i]);
}

// Outputs [n_begin, n_end) of every row
template <typename T>
void small_linear_fwd_kernel(const SmallLinearArgs& args, int64_t n_begin, int64_t n_end) {
  if (!args.transposed) {
    int64_t n = n_begin;
    for (; n + 4 <= n_end; n += 4) dot_rows<T, 4>(args, n);
    for (; n < n_end; ++n) dot_rows<T, 1>(args, n);
    return;
  }
  constexpr int64_t kStrip = 1024;
  float sums[4 * kStrip];
  for (int64_t n = n_begin; n < n_end; n += kStrip) {
    const int64_t end = n + kStrip < n_end ? n + kStrip : n_end;
    int64_t row = 0;
    for (; row + 4 <= args.rows; row += 4) strip_rows<T, 4>(args, row, n, end, sums, kStrip);
    if (row + 2 <= args.rows) {
      strip_rows<T, 2>(args, row, n, end, sums, kStrip);
      row += 2;
    }
    if (row < args.rows) strip_rows<T, 1>(args, row, n, end, sums, kStrip);
  }
}

}  // namespace ia3::IA3_ISA
