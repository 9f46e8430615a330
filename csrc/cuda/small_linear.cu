// y = ((x s_in) W^T + b) s_out for at most 16 rows (decoding), several outputs of one input in a launch. Rows T, inputs
// K, outputs N of all matrices together, b bytes an element.
//
// Memory-bound: N K b bytes of weights, each read once, against T K b + T N b of activations; 2 T N K flops. At
// 3.35 TB/s an H100 reads 1.7e12 weights of 16 bits a second: 16 rows are 54 TFLOP/s, 5 % of its tensor cores and 80 %
// of its other units, conversions and loads of x not counted. So 16 bits go through the tensor cores (mma.sync, fp32
// sums), however few the rows, and a warp spends two instructions on a kilobyte of weights; fp32 has half as many
// weights a second, and its products stay exact in fused multiply-adds. The tensor cores take x s_in in 16 bits,
// rounded as the eager formula rounds it; everything else is fp32 with one rounding at the end.
//
// What keeps memory busy is loads in flight: 3.35 TB/s over 132 multiprocessors at 1 us wants 25 KB of each. A block of
// 128 threads has 16 loads of 16 bytes a thread in flight, 32 KB. K is split over a block's warps, and over as many
// blocks as it takes to fill the device (`parts`); the block that comes last adds their sums up, in the order of K.
#include "instructions.h"
#include "launch.h"
#include "scales.h"

namespace ia3::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kBlock = 32 * kWarps;
constexpr int kBlocks = 3;  // on a multiprocessor at a time, which bounds the registers of a thread

// The call's arguments, and what the host derives from them
struct Decode {
  ia3_small_linear_args call;
  int64_t first_tile[IA3_SMALL_OUTPUTS + 1];
  int64_t steps_a_part;    // of K, each taken by a block at a time
  int64_t longer_parts;    // as many of the first parts have a step more
  unsigned int* arrivals;  // [tiles]: parts whose sums are in `partials`
  float* partials;         // [tiles, parts, rows, outputs of a tile]
};

// The output matrix of this block, and the first of the outputs that it computes
struct Place {
  ia3_linear_output output;
  int64_t first;
};

// Selected, not indexed: an index that is not a constant would put the arguments into local memory.
__device__ __forceinline__ Place place_of(const Decode& p, int outputs_a_tile) {
  Place place{p.call.outputs[0], 0};
  int64_t tiles_before = 0;
#pragma unroll
  for (int i = 1; i < IA3_SMALL_OUTPUTS; ++i) {
    if (i >= p.call.count || int64_t(blockIdx.x) < p.first_tile[i]) continue;
    place.output = p.call.outputs[i];
    tiles_before = p.first_tile[i];
  }
  place.first = (int64_t(blockIdx.x) - tiles_before) * outputs_a_tile;
  return place;
}

// The steps of K that this block takes
struct Steps {
  int64_t first, last;
};

__device__ __forceinline__ Steps steps_of(const Decode& p) {
  const int64_t part = blockIdx.y;
  const int64_t first = part * p.steps_a_part + min(part, p.longer_parts);
  return {first, first + p.steps_a_part + (part < p.longer_parts)};
}

__device__ __forceinline__ int32_t adapter_of(const ia3_scale& scale, int row) {
  return differs_by_row(scale) ? scale.index[row] : 0;
}

// Columns col .. of the scale of a row whose adapter is known
template <int kSize>
__device__ __forceinline__ void load_row_scale(const ia3_scale& scale, int32_t adapter, int64_t cols, int64_t col,
                                               float (&values)[kSize]) {
  if (differs_by_row(scale)) {
    load_adapter(scale, adapter, cols, col, values);
  } else {
    load_shared_scale(scale, col, values);
  }
}

// --- what every kernel does with its sums -------------------------------------------------------------------------

// Sums of a tile: kCopies of them, over parts of K, to be added up
template <int kCopies, int kRows, int kOutputs>
struct TileSums {
  float values[kCopies][kRows][kOutputs];
};

template <typename T>
__device__ __forceinline__ void store_output(const Place& place, int row, int output, float sum) {
  const ia3_linear_output& o = place.output;
  const int64_t n = place.first + output;
  if (n >= o.out) return;
  // y = (x W^T + b) s_out
  if (o.bias != nullptr) sum += widen(static_cast<const T*>(o.bias)[n]);
  float s[1];
  load_row_scale(o.scale, adapter_of(o.scale, row), o.out, n, s);
  static_cast<T*>(o.y)[row * o.y_stride + n] = rounded(sum * s[0], T{});
}

template <typename T, int kCopies, int kRows, int kOutputs>
__device__ __forceinline__ void finish(const Decode& p, const Place& place,
                                       const TileSums<kCopies, kRows, kOutputs>& sums) {
  IA3_SHARED(bool, is_last);
  const int count = int(p.call.rows) * kOutputs;
  const int parts = int(gridDim.y);
  float* partials = p.partials + (int64_t(blockIdx.x) * parts + blockIdx.y) * count;
  __syncthreads();
  for (int i = int(threadIdx.x); i < count; i += kBlock) {
    float sum = sums.values[0][i / kOutputs][i % kOutputs];
#pragma unroll
    for (int copy = 1; copy < kCopies; ++copy) sum += sums.values[copy][i / kOutputs][i % kOutputs];
    if (parts == 1) {
      store_output<T>(place, i / kOutputs, i % kOutputs, sum);
    } else {
      partials[i] = sum;
    }
  }
  if (parts == 1) return;
  __threadfence();  // the sums are visible before the arrival is
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.arrivals + blockIdx.x, 1u) == unsigned(parts - 1);
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = int(threadIdx.x); i < count; i += kBlock) {
    const float* part = p.partials + int64_t(blockIdx.x) * parts * count + i;
    float sum = 0.0f;
    for (int j = 0; j < parts; ++j) sum += __ldcg(part + j * count);
    store_output<T>(place, i / kOutputs, i % kOutputs, sum);
  }
}

// --- tensor cores: 16 bits ----------------------------------------------------------------------------------------

// Two neighbours of x, times theirs of s_in
template <typename T>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t pair, float low, float high) {
  return round_pair(widen(T{uint16_t(pair)}) * low, widen(T{uint16_t(pair >> 16)}) * high, T{});
}

// Rows of x that a lane feeds to the product: row g of every 8, scaled. Rows beyond the last repeat it; what comes of
// them is not stored.
template <typename T, int kRowTiles>
struct RowsOfX {
  const T* rows[kRowTiles];
  int32_t adapters[kRowTiles];

  __device__ __forceinline__ RowsOfX(const Decode& p, int g) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      const int row = min(j * 8 + g, int(p.call.rows) - 1);
      rows[j] = static_cast<const T*>(p.call.x) + row * p.call.x_stride;
      adapters[j] = adapter_of(p.call.input_scale, row);
    }
  }

  template <int kPairs>
  __device__ __forceinline__ void scale(const Decode& p, int j, int64_t k, uint32_t (&pairs)[kPairs]) const {
    if (p.call.input_scale.scale == nullptr) return;
    float s[2 * kPairs];
    load_row_scale(p.call.input_scale, adapters[j], p.call.in, k, s);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs[i] = scaled_pair<T>(pairs[i], s[2 * i], s[2 * i + 1]);
  }
};

// W [out, in]: a lane reads 8 inputs of an output at once, which make two products: the sum over K may take its terms
// in any order, as long as x takes them in the same.
template <int kRowTiles>
struct Straight {
  static constexpr int kOutputTiles = 2 * kRowTiles;  // of 16; more of them share what is read of x
  static constexpr int kOutputs = 16 * kOutputTiles;
  static constexpr int kUnroll = 4 / kRowTiles;
  static constexpr int kStep = 32 * kUnroll;  // inputs that a warp takes at a time
};

template <typename T, int kRowTiles>
__global__ void __launch_bounds__(kBlock, kBlocks) small_linear_fwd_kernel(const __grid_constant__ Decode p) {
  using Shape = Straight<kRowTiles>;
  using Sums = TileSums<kWarps, 8 * kRowTiles, Shape::kOutputs>;
  IA3_SHARED(Sums, sums);
  const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4, q = int(threadIdx.x) % 4;
  const Place place = place_of(p, Shape::kOutputs);
  const RowsOfX<T, kRowTiles> x(p, g);
  const int64_t stride = place.output.weight_stride;
  const T* weights = static_cast<const T*>(place.output.weight) + (place.first + g) * stride;
  const int outputs_left = int(min(place.output.out - place.first - g, int64_t(Shape::kOutputs)));

  float acc[Shape::kOutputTiles][kRowTiles][4] = {};
  const Steps steps = steps_of(p);
  for (int64_t step = steps.first; step < steps.last; ++step) {
    const int64_t first = (step * kWarps + warp) * Shape::kStep + q * 8;
    uint4 w[Shape::kUnroll][Shape::kOutputTiles][2], values[Shape::kUnroll][kRowTiles];
#pragma unroll
    for (int i = 0; i < Shape::kUnroll; ++i) {
      const int64_t k = first + i * 32;
      const bool exists = k < p.call.in;
#pragma unroll
      for (int m = 0; m < Shape::kOutputTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int n = m * 16 + h * 8;
          w[i][m][h] = exists && n < outputs_left ? load_once(weights + n * stride + k) : uint4{};
        }
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) values[i][j] = exists ? load_wide<uint4>(x.rows[j] + k) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < Shape::kUnroll; ++i)
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        uint32_t b[4] = {values[i][j].x, values[i][j].y, values[i][j].z, values[i][j].w};
        if (first + i * 32 < p.call.in) x.scale(p, j, first + i * 32, b);
#pragma unroll
        for (int m = 0; m < Shape::kOutputTiles; ++m) {
          const uint4 upper = w[i][m][0], lower = w[i][m][1];
          multiply_add(acc[m][j], {upper.x, lower.x, upper.y, lower.y}, {b[0], b[1]}, T{});
          multiply_add(acc[m][j], {upper.z, lower.z, upper.w, lower.w}, {b[2], b[3]}, T{});
        }
      }
  }
#pragma unroll
  for (int m = 0; m < Shape::kOutputTiles; ++m)
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.values[warp][j * 8 + q * 2 + i % 2][m * 16 + i / 2 * 8 + g] = acc[m][j][i];
  finish<T>(p, place, sums);
}

// W [in, out]: a lane reads 8 outputs of an input at once, of four inputs in a row, and pairs them up by input.
template <int kRowTiles>
struct Transposed {
  static constexpr int kOutputs = 64;
  static constexpr int kUnroll = 5 - kRowTiles;  // what registers allow
  static constexpr int kStep = 16 * kUnroll;
};

__device__ __forceinline__ uint32_t low_halves(uint32_t first, uint32_t second) {
  return (first & 0xffffu) | second << 16;
}
__device__ __forceinline__ uint32_t high_halves(uint32_t first, uint32_t second) {
  return first >> 16 | (second & 0xffff0000u);
}

template <typename T, int kRowTiles>
__global__ void __launch_bounds__(kBlock, kBlocks)
    small_linear_transposed_fwd_kernel(const __grid_constant__ Decode p) {
  using Shape = Transposed<kRowTiles>;
  using Sums = TileSums<kWarps, 8 * kRowTiles, Shape::kOutputs>;
  IA3_SHARED(Sums, sums);
  const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4, q = int(threadIdx.x) % 4;
  const Place place = place_of(p, Shape::kOutputs);
  const RowsOfX<T, kRowTiles> x(p, g);
  const int64_t n = min(place.first + g * 8, place.output.out - 8);
  const T* weights = static_cast<const T*>(place.output.weight) + n;

  float acc[4][kRowTiles][4] = {};
  const Steps steps = steps_of(p);
  for (int64_t step = steps.first; step < steps.last; ++step) {
    const int64_t first = (step * kWarps + warp) * Shape::kStep + q * 4;
    uint4 w[Shape::kUnroll][4];
    uint2 values[Shape::kUnroll][kRowTiles];
#pragma unroll
    for (int i = 0; i < Shape::kUnroll; ++i) {
      const int64_t k = first + i * 16;
      const bool exists = k < p.call.in;
#pragma unroll
      for (int h = 0; h < 4; ++h)
        w[i][h] = exists ? load_once(weights + (k + h) * place.output.weight_stride) : uint4{};
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) values[i][j] = exists ? load_wide<uint2>(x.rows[j] + k) : uint2{};
    }
#pragma unroll
    for (int i = 0; i < Shape::kUnroll; ++i) {
      const uint32_t words[4][4] = {{w[i][0].x, w[i][0].y, w[i][0].z, w[i][0].w},
                                    {w[i][1].x, w[i][1].y, w[i][1].z, w[i][1].w},
                                    {w[i][2].x, w[i][2].y, w[i][2].z, w[i][2].w},
                                    {w[i][3].x, w[i][3].y, w[i][3].z, w[i][3].w}};
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        uint32_t b[2] = {values[i][j].x, values[i][j].y};
        if (first + i * 16 < p.call.in) x.scale(p, j, first + i * 16, b);
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // outputs 2 m and 2 m + 1 of each lane's 8
          multiply_add(acc[m][j],
                       {low_halves(words[0][m], words[1][m]), high_halves(words[0][m], words[1][m]),
                        low_halves(words[2][m], words[3][m]), high_halves(words[2][m], words[3][m])},
                       b, T{});
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.values[warp][j * 8 + q * 2 + i % 2][g * 8 + m * 2 + i / 2] = acc[m][j][i];
  finish<T>(p, place, sums);
}

// --- multiply-adds: fp32, and 16 bits that do not lie on 16 bytes -------------------------------------------------

// x s_in of one row
template <typename T, int kSize>
__device__ __forceinline__ void load_x(const Decode& p, int row, int32_t adapter, int64_t k, float (&values)[kSize]) {
  float s[kSize];
  Elements<T, kSize> x;
  x.load(static_cast<const T*>(p.call.x) + row * p.call.x_stride + k);
  x.widen(values);
  if (p.call.input_scale.scale == nullptr) return;
  load_row_scale(p.call.input_scale, adapter, p.call.in, k, s);
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] *= s[i];
}

// W [out, in]: the lanes of a warp read 32 kSize inputs of an output, and add up their sums in the end. The block's
// warps have outputs of their own, and share x in the first-level cache.
template <int kSize>
struct StraightFma {
  static constexpr int kOutputsOfWarp = 4;
  static constexpr int kOutputs = kOutputsOfWarp * kWarps;
  static constexpr int kUnroll = 2;
  static constexpr int kStep = 32 * kSize * kUnroll;
};

template <typename T, int kSize, int kRows>
__global__ void __launch_bounds__(kBlock, kBlocks) small_linear_fma_fwd_kernel(const __grid_constant__ Decode p) {
  using Shape = StraightFma<kSize>;
  using Sums = TileSums<1, kRows, Shape::kOutputs>;
  IA3_SHARED(Sums, sums);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const Place place = place_of(p, Shape::kOutputs);
  const T* weights[Shape::kOutputsOfWarp];
#pragma unroll
  for (int o = 0; o < Shape::kOutputsOfWarp; ++o) {
    // Outputs beyond the last repeat it; what comes of them is not stored.
    const int64_t n = min(place.first + warp * Shape::kOutputsOfWarp + o, place.output.out - 1);
    weights[o] = static_cast<const T*>(place.output.weight) + n * place.output.weight_stride;
  }

  float acc[kRows][Shape::kOutputsOfWarp] = {};
  const Steps steps = steps_of(p);
  for (int64_t step = steps.first; step < steps.last; ++step) {
    const int64_t first = step * Shape::kStep + lane * kSize;
    Elements<T, kSize> w[Shape::kUnroll][Shape::kOutputsOfWarp];
#pragma unroll
    for (int i = 0; i < Shape::kUnroll; ++i) {
      const int64_t k = first + i * 32 * kSize;
      if (k >= p.call.in) continue;
#pragma unroll
      for (int o = 0; o < Shape::kOutputsOfWarp; ++o) w[i][o].load(weights[o] + k);
    }
#pragma unroll
    for (int i = 0; i < Shape::kUnroll; ++i) {
      const int64_t k = first + i * 32 * kSize;
      if (k >= p.call.in) continue;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= p.call.rows) continue;
        float x[kSize];
        load_x<T>(p, row, adapter_of(p.call.input_scale, row), k, x);
#pragma unroll
        for (int o = 0; o < Shape::kOutputsOfWarp; ++o) {
          float values[kSize];
          w[i][o].widen(values);
#pragma unroll
          for (int j = 0; j < kSize; ++j) acc[row][o] = fmaf(x[j], values[j], acc[row][o]);
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row)
#pragma unroll
    for (int o = 0; o < Shape::kOutputsOfWarp; ++o) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) acc[row][o] += __shfl_xor_sync(0xffffffffu, acc[row][o], offset);
      if (lane == 0) sums.values[0][row][warp * Shape::kOutputsOfWarp + o] = acc[row][o];
    }
  finish<T>(p, place, sums);
}

// W [in, out]: the lanes of a warp read 32 kSize outputs of an input; the block's warps have inputs of their own.
template <int kSize>
struct TransposedFma {
  static constexpr int kOutputs = 32 * kSize;
  static constexpr int kStep = 8;  // inputs that a warp takes at a time
};

template <typename T, int kSize, int kRows>
__global__ void __launch_bounds__(kBlock, kBlocks)
    small_linear_transposed_fma_fwd_kernel(const __grid_constant__ Decode p) {
  using Shape = TransposedFma<kSize>;
  using Sums = TileSums<kWarps, kRows, Shape::kOutputs>;
  IA3_SHARED(Sums, sums);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const Place place = place_of(p, Shape::kOutputs);
  const int64_t n = min(place.first + lane * kSize, place.output.out - kSize);
  const T* weights = static_cast<const T*>(place.output.weight) + n;

  float acc[kRows][kSize] = {};
  const Steps steps = steps_of(p);
  for (int64_t step = steps.first; step < steps.last; ++step) {
    const int64_t first = (step * kWarps + warp) * Shape::kStep;
    Elements<T, kSize> w[Shape::kStep];
#pragma unroll
    for (int i = 0; i < Shape::kStep; ++i)
      if (first + i < p.call.in) w[i].load(weights + (first + i) * place.output.weight_stride);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= p.call.rows) continue;
#pragma unroll
      for (int i = 0; i < Shape::kStep; i += kSize) {
        if (first + i >= p.call.in) continue;
        float x[kSize];
        load_x<T>(p, row, adapter_of(p.call.input_scale, row), first + i, x);
#pragma unroll
        for (int h = 0; h < kSize; ++h) {
          float values[kSize];
          w[i + h].widen(values);
#pragma unroll
          for (int j = 0; j < kSize; ++j) acc[row][j] = fmaf(x[h], values[j], acc[row][j]);
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row)
#pragma unroll
    for (int j = 0; j < kSize; ++j) sums.values[warp][row][lane * kSize + j] = acc[row][j];
  finish<T>(p, place, sums);
}

// --- host ---------------------------------------------------------------------------------------------------------

// How a kernel cuts its work
struct Variant {
  void (*kernel)(Decode);
  int64_t outputs_a_tile;
  int64_t inputs_a_step;  // of a block
};

template <typename T, int kRowTiles>
Variant tensor_core_variant(bool transposed) {
  using S = Straight<kRowTiles>;
  using X = Transposed<kRowTiles>;
  if (transposed) return {small_linear_transposed_fwd_kernel<T, kRowTiles>, X::kOutputs, X::kStep * kWarps};
  return {small_linear_fwd_kernel<T, kRowTiles>, S::kOutputs, S::kStep * kWarps};
}

template <typename T, int kSize, int kRows>
Variant fma_variant(bool transposed) {
  using S = StraightFma<kSize>;
  using X = TransposedFma<kSize>;
  if (transposed) return {small_linear_transposed_fma_fwd_kernel<T, kSize, kRows>, X::kOutputs, X::kStep * kWarps};
  return {small_linear_fma_fwd_kernel<T, kSize, kRows>, S::kOutputs, S::kStep};
}

template <typename T>
Variant variant_for(const ia3_small_linear_args& args, bool is_wide) {
  if (!is_wide) return fma_variant<T, 1, IA3_SMALL_ROWS>(args.transposed);
  if constexpr (sizeof(T) == 2) {
    return args.rows <= 8 ? tensor_core_variant<T, 1>(args.transposed) : tensor_core_variant<T, 2>(args.transposed);
  } else {
    return args.rows <= 4 ? fma_variant<T, 4, 4>(args.transposed) : fma_variant<T, 4, IA3_SMALL_ROWS>(args.transposed);
  }
}

struct Plan {
  int64_t first_tile[IA3_SMALL_OUTPUTS + 1];  // and, last, how many tiles there are
  int64_t steps, parts;
  size_t arrivals, partials;  // bytes, in this order in the workspace
};

// Into how many parts K is cut: as many as finish first, where a device has room for kSlots blocks at a time, on about
// 128 multiprocessors, and a block takes a step's time to begin and end. A function of the shape alone, so that results
// are, too.
int64_t parts_for(int64_t tiles, int64_t steps) {
  constexpr int64_t kSlots = 128 * kBlocks, kMostParts = 16;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t parts = 1; parts <= kMostParts && parts <= steps; ++parts) {
    const int64_t time = ceil_div(tiles * parts, kSlots) * (ceil_div(steps, parts) + 1);
    if (time < least) least = time, best = parts;
  }
  return best;
}

Plan plan_for(const ia3_small_linear_args& args, const Variant& variant) {
  Plan plan{};
  for (int i = 0; i < IA3_SMALL_OUTPUTS; ++i) {
    const int64_t tiles = i < args.count ? ceil_div(args.outputs[i].out, variant.outputs_a_tile) : 0;
    plan.first_tile[i + 1] = plan.first_tile[i] + tiles;
  }
  const int64_t tiles = plan.first_tile[IA3_SMALL_OUTPUTS];
  plan.steps = ceil_div(args.in, variant.inputs_a_step);
  plan.parts = parts_for(tiles, plan.steps);
  if (plan.parts == 1) return plan;
  plan.arrivals = size_t(ceil_div<int64_t>(tiles * int64_t(sizeof(unsigned int)), 16) * 16);
  plan.partials = size_t(tiles * plan.parts * args.rows * variant.outputs_a_tile) * sizeof(float);
  return plan;
}

template <typename T>
bool is_wide(const ia3_small_linear_args& args) {
  if (args.in % kWide<T> != 0 || !is_on_16_bytes(args.input_scale.scale) ||
      !are_rows_on_16_bytes(sizeof(T), {{"x", args.x, args.x_stride}}))
    return false;
  for (int i = 0; i < args.count; ++i) {
    const ia3_linear_output& output = args.outputs[i];
    if (!are_rows_on_16_bytes(sizeof(T), {{"weight", output.weight, output.weight_stride}})) return false;
    if (args.transposed && output.out % kWide<T> != 0) return false;
  }
  return true;
}

ia3_status check_output(const ia3_small_linear_args& args, const ia3_linear_output& output) {
  const int64_t weight_rows = args.transposed ? args.in : output.out,
                weight_cols = args.transposed ? output.out : args.in;
  if (output.out < 0)
    return fail(IA3_INVALID, "an output has %lld columns; expected 0 or more.", static_cast<long long>(output.out));
  return last_failure({check_scale("an output's scale", output.scale),
                       check_matrix({"y", output.y, output.y_stride}, args.rows, output.out, true),
                       check_matrix({"weight", output.weight, output.weight_stride}, weight_rows, weight_cols, false)});
}

ia3_status check(const ia3_small_linear_args& args) {
  if (args.count < 1 || args.count > IA3_SMALL_OUTPUTS)
    return fail(IA3_INVALID, "there are %d outputs; expected 1 to %d.", args.count, IA3_SMALL_OUTPUTS);
  const ia3_status status = last_failure({check_scale("input_scale", args.input_scale),
                                          check_matrix({"x", args.x, args.x_stride}, args.rows, args.in, false),
                                          check_dtype(args.dtype), check_sizes(args.rows, args.in)});
  if (status != IA3_OK) return status;
  for (int i = 0; i < args.count; ++i)
    if (const ia3_status of_output = check_output(args, args.outputs[i]); of_output != IA3_OK) return of_output;
  if (args.rows <= IA3_SMALL_ROWS) return IA3_OK;
  return fail(IA3_UNSUPPORTED, "x has %lld rows; the kernel for decoding takes at most %d.",
              static_cast<long long>(args.rows), IA3_SMALL_ROWS);
}

}  // namespace
}  // namespace ia3::cuda

// Enough for either path: the size must not depend on addresses.
size_t ia3_cuda_small_linear_workspace(const ia3_small_linear_args* args) {
  using namespace ia3::cuda;
  size_t most = 0;
  if (args->count < 1 || args->count > IA3_SMALL_OUTPUTS || args->rows > IA3_SMALL_ROWS) return most;
  (void)visit_dtype(args->dtype, [&](auto type) {
    for (const bool wide : {false, true}) {
      const Plan plan = plan_for(*args, variant_for<decltype(type)>(*args, wide));
      if (plan.arrivals + plan.partials > most) most = plan.arrivals + plan.partials;
    }
    return IA3_OK;
  });
  return most;
}

ia3_status ia3_cuda_small_linear(const ia3_small_linear_args* args, ia3_stream stream) {
  using namespace ia3::cuda;
  if (const ia3_status status = check(*args); status != IA3_OK) return status;
  return visit_dtype(args->dtype, [&](auto type) {
    using T = decltype(type);
    const Variant variant = variant_for<T>(*args, is_wide<T>(*args));
    const Plan plan = plan_for(*args, variant);
    const int64_t tiles = plan.first_tile[IA3_SMALL_OUTPUTS];
    if (args->rows == 0 || tiles == 0) return IA3_OK;
    if (plan.parts > 1 && (args->workspace == nullptr || !is_on_16_bytes(args->workspace)))
      return fail(IA3_INVALID, "workspace is %p; expected %zu bytes on a multiple of 16.", args->workspace,
                  ia3_cuda_small_linear_workspace(args));
    Decode p{};
    p.call = *args;
    for (int i = 0; i <= IA3_SMALL_OUTPUTS; ++i) p.first_tile[i] = plan.first_tile[i];
    p.steps_a_part = plan.steps / plan.parts;
    p.longer_parts = plan.steps % plan.parts;
    if (plan.parts > 1) {
      p.arrivals = static_cast<unsigned int*>(args->workspace);
      p.partials = reinterpret_cast<float*>(static_cast<char*>(args->workspace) + plan.arrivals);
      const ia3_status zeroed = checked(cudaMemsetAsync(p.arrivals, 0, plan.arrivals, stream));
      if (zeroed != IA3_OK) return zeroed;
    }
    return launch(variant.kernel, dim3(unsigned(tiles), unsigned(plan.parts)), dim3(kBlock), p, stream);
  });
}
