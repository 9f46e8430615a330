// y = ((x s_in) W^T + b) s_out for many rows: fp32 arithmetic on operands that are widened while they are packed.
//
// T rows, N outputs, K inputs: 2 T N K flops. The inner loop keeps kTileRows x kLanes sums in registers; each step
// takes one line of a panel of W and a value of every row: at kTileRows = 14, 16 loads for 28 multiply-adds, which are
// the floor. A panel stays in the first-level cache while all rows pass by it from the second. W is read once.
#pragma once

#include <utility>

#include "arguments.h"
#include "panels.h"
#include "scale.h"

namespace ia3::IA3_ISA {

// As many rows as leave their sums, one line of the panel and one value in registers
#if defined(IA3_USE_AVX512)
constexpr int kTileRows = 14;
#elif defined(IA3_USE_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif
// Panels whose sums leave together, as longer rows of y
constexpr int64_t kGroup = 4;

// sums [kRows][kLanes] <- or += x [kRows][depth] times the panel
template <int kRows>
void multiply_tile(const float* x, const float* panel, int64_t depth, float* sums, int64_t stride, bool is_first) {
  Vec totals[kRows][2];
  IA3_UNROLL for (int t = 0; t < kRows; ++t) totals[t][0] = totals[t][1] = broadcast(0.0f);
  IA3_UNROLL for (int t = 0; t < kRows; ++t) {
    __builtin_prefetch(sums + t * stride, 1);
    __builtin_prefetch(sums + t * stride + Vec::kSize, 1);
  }
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(x + kRows * kDepth + k * 16);  // the rows of the next tile, which lie behind these
    const Vec low = load(panel + k * kLanes), high = load(panel + k * kLanes + Vec::kSize);
    IA3_UNROLL for (int t = 0; t < kRows; ++t) {
      const Vec value = broadcast(x[t * kDepth + k]);
      totals[t][0] = fma(value, low, totals[t][0]);
      totals[t][1] = fma(value, high, totals[t][1]);
    }
  }
  IA3_UNROLL for (int t = 0; t < kRows; ++t) {
    float* to = sums + t * stride;
    store(to, is_first ? totals[t][0] : load(to) + totals[t][0]);
    store(to + Vec::kSize, is_first ? totals[t][1] : load(to + Vec::kSize) + totals[t][1]);
  }
}

using MultiplyTile = void (*)(const float*, const float*, int64_t, float*, int64_t, bool);

template <int... kRows>
constexpr MultiplyTile tile_of(int rows, std::integer_sequence<int, kRows...>) {
  constexpr MultiplyTile kTiles[] = {multiply_tile<kRows + 1>...};
  return kTiles[rows - 1];
}

// Rows [row_begin, row_end) and the outputs of panels [panel_begin, panel_end); `sums` is scratch for kGroup * kLanes
// floats a row. args.x is packed, of args.rows rows.
template <typename T>
void blocked_linear_kernel(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                           int64_t panel_end, float* sums) {
  alignas(64) float panel[kDepth * kLanes];
  constexpr int64_t kStride = kGroup * kLanes;
  const T* const weight = static_cast<const T*>(args.weight);
  const int64_t rows = row_end - row_begin, tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t first = panel_begin; first < panel_end; first += kGroup) {
    const int64_t last = first + kGroup < panel_end ? first + kGroup : panel_end;
    for (int64_t block = 0; block < args.in; block += kDepth) {
      const int64_t depth = args.in - block < kDepth ? args.in - block : kDepth;
      for (int64_t p = first; p < last; ++p) {
        const int64_t n = p * kLanes, lanes = args.out - n < kLanes ? args.out - n : kLanes;
        if (args.transposed) {
          pack_stored_panel(weight + block * args.weight_stride + n, args.weight_stride, lanes, depth, panel);
        } else {
          pack_panel(weight + n * args.weight_stride + block, args.weight_stride, lanes, depth, panel);
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal heights, within one
          const int64_t begin = rows * tile / tiles, height = rows * (tile + 1) / tiles - begin;
          const float* x = args.x + block * args.rows + (row_begin + begin) * kDepth;
          const auto multiply = tile_of(int(height), std::make_integer_sequence<int, kTileRows>());
          multiply(x, panel, depth, sums + begin * kStride + (p - first) * kLanes, kStride, block == 0);
        }
      }
    }
    const int64_t n = first * kLanes, end = last * kLanes < args.out ? last * kLanes : args.out;
    narrow_kernel<T>(args, sums - row_begin * kStride, kStride, n, end - n, row_begin, row_end);
  }
}

}  // namespace ia3::IA3_ISA
