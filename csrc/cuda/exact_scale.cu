// Scaling a weight in place such that it can be undone bit-exactly, and undoing it; docs/exact-merging.md has the
// proof.
//
//   merge    w' = round(w l),  parity = w & 1
//   unmerge  n = w' (1 / l) towards zero,  w = n + ((n ^ parity) & 1)
//   swap     both: the old l out of the weight, the new one into it
//
// Memory-bound: 2 b + 1/8 bytes a weight of b bytes, in one pass. A thread has 8 columns, so a byte of the parity, at
// kRowsAtOnce rows, whose loads are in flight together. 16-bit weights are handled two to a register.
//
// Merging unmerges at once, in registers. A warp that finds an escape among its 256 weights of a row, its unit, leaves
// them as they were and writes down how many there are. So nothing is lost while nobody knows how much memory escapes
// will need; when it is there, the same kernel visits those units alone, and puts each escape where the sum of the
// counts before it says: in ascending order, whatever ran first. If there is no such memory, it takes back the others.
#include <algorithm>

#include "../core/parity.h"
#include "instructions.h"
#include "launch.h"

namespace ia3::cuda {
namespace {

// With what would cost every thread a division
struct Args : ia3_exact_scale_args {
  int64_t blocks_a_group, blocks;  // of rows
};

enum class Step { kMerge, kUnmerge, kSwap };

constexpr int kRowsAtOnce = 4;
constexpr int kColumns = 8;
constexpr int kUnit = 32 * kColumns;
constexpr unsigned kWarp = 0xffffffffu;
constexpr int64_t kBlocksInARow = 4;   // of rows, that a block of threads visits
constexpr int64_t kManyBlocks = 1056;  // four times what the largest GPUs run at once

// --- arithmetic on 32 bits: one fp32 weight, or two of 16 bits ----------------------------------------------------

#if !defined(__CUDA_ARCH__)
// The device knows one NaN, the largest pattern of each type. Here too, lest tests miss what follows from that.
template <typename T>
uint32_t one_nan(T type, float value, uint32_t pattern) {
  return value == value ? pattern : 0x7fffffffu >> (32 - 8 * sizeof(type));
}
#endif

template <typename T>
struct Piece {  // two of 16 bits
  using Word = uint16_t;
  using Inverse = float;
  static constexpr int kWeights = 2;
  static constexpr uint32_t kOnes = 0x00010001u, kSigns = 0x80008000u;
  // What is to be added to the largest finite magnitude, or to infinity, so that anything above reaches the sign bit
  static constexpr uint32_t kAboveFinite = std::is_same_v<T, BFloat16> ? 0x00800080u : 0x04000400u;
  static constexpr uint32_t kAboveInfinity = kAboveFinite - kOnes;

  __device__ static __forceinline__ float low(uint32_t w) { return widen(T{uint16_t(w)}); }
  __device__ static __forceinline__ float high(uint32_t w) { return widen(T{uint16_t(w >> 16)}); }

  __device__ static __forceinline__ uint32_t scaled(uint32_t w, float s, float t) {
    return round_pair(low(w) * s, high(w) * t, T{});
  }
  __device__ static __forceinline__ uint32_t unscaled(uint32_t w, float r, float q) {
    const float a = low(w) * r, b = high(w) * q;
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, BFloat16>) {
      return __byte_perm(as_bits(a), as_bits(b), 0x7632);
    } else {
      uint32_t pair;
      asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
      return pair;
    }
#else
    return one_nan(T{}, a, towards_zero(a, T{})) | one_nan(T{}, b, towards_zero(b, T{})) << 16;
#endif
  }
  // The lowest bit of both, moved to bits 0 and 1; and back
  __device__ static __forceinline__ uint32_t low_bits(uint32_t w) { return (w & 1u) | (w >> 15 & 2u); }
  __device__ static __forceinline__ uint32_t spread(uint32_t bits) { return (bits | bits << 15) & kOnes; }
};

template <>
struct Piece<float> {
  using Word = uint32_t;
  using Inverse = double;
  static constexpr int kWeights = 1;
  static constexpr uint32_t kOnes = 1u, kSigns = 0x80000000u;
  static constexpr uint32_t kAboveFinite = 0x00800000u, kAboveInfinity = kAboveFinite - 1u;

  __device__ static __forceinline__ uint32_t scaled(uint32_t w, float s, float) { return as_bits(as_float(w) * s); }
  __device__ static __forceinline__ uint32_t unscaled(uint32_t w, double r, double) {
#if defined(__CUDA_ARCH__)
    return as_bits(__double2float_rz(double(as_float(w)) * r));
#else
    const double quotient = double(as_float(w)) * r;
    return one_nan(float{}, float(quotient), towards_zero(quotient, float{}));
#endif
  }
  __device__ static __forceinline__ uint32_t low_bits(uint32_t w) { return w & 1u; }
  __device__ static __forceinline__ uint32_t spread(uint32_t bits) { return bits & 1u; }
};

template <typename T>
constexpr int kPieces = kColumns / Piece<T>::kWeights;

// The sign bits of those weights that are above
template <typename T>
__device__ __forceinline__ uint32_t exceeds(uint32_t w, uint32_t above) {
  return ((w & ~Piece<T>::kSigns) + above) & Piece<T>::kSigns;
}

// --- a thread's 8 columns of a row --------------------------------------------------------------------------------

template <typename T>
struct Columns {
  static constexpr int kWeights = Piece<T>::kWeights;
  using Word = typename Piece<T>::Word;
  uint32_t pieces[kPieces<T>];

  // Of `count` columns, in 16 bytes each time where kWide; those beyond are zero
  template <bool kWide>
  __device__ __forceinline__ void load(const T* from, int count) {
    if constexpr (kWide) {
#pragma unroll
      for (int p = 0; p < kPieces<T>; p += 4) {
        const uint4 part = load_wide<uint4>(from + p * kWeights);
        pieces[p] = part.x, pieces[p + 1] = part.y, pieces[p + 2] = part.z, pieces[p + 3] = part.w;
      }
    } else {
#pragma unroll
      for (int p = 0; p < kPieces<T>; ++p) pieces[p] = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (c < count) set(c, reinterpret_cast<const Word*>(from)[c]);
    }
  }
  template <bool kWide>
  __device__ __forceinline__ void store(T* to, int count) const {
    if constexpr (kWide) {
#pragma unroll
      for (int p = 0; p < kPieces<T>; p += 4)
        store_16_bytes(to + p * kWeights, pieces[p], pieces[p + 1], pieces[p + 2], pieces[p + 3]);
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (c < count) reinterpret_cast<Word*>(to)[c] = get(c);
    }
  }
  __device__ __forceinline__ Word get(int c) const { return Word(pieces[c / kWeights] >> c % kWeights * 16); }
  __device__ __forceinline__ void set(int c, uint32_t bits) {
    const int shift = c % kWeights * 16;
    uint32_t& piece = pieces[c / kWeights];
    piece = (piece & ~(uint32_t(Word(-1)) << shift)) | bits << shift;
  }
  __device__ __forceinline__ uint32_t low_bits() const {
    uint32_t bits = 0;
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) bits |= Piece<T>::low_bits(pieces[p]) << p * kWeights;
    return bits;
  }
};

// What those columns are multiplied by: each by its own, or all by their row's
template <typename T, bool kWide, bool kScalesRows, bool kInverts>
struct Factors {
  using Inverse = typename Piece<T>::Inverse;
  static constexpr int kCount = kScalesRows ? 1 : kColumns;
  float scale[kCount];
  Inverse inverse[kInverts ? kCount : 1];

  __device__ __forceinline__ void load(const float* from, int count) {
    if constexpr (kWide && !kScalesRows) {
      load_floats(from, scale);
    } else {
#pragma unroll
      for (int c = 0; c < kCount; ++c) scale[c] = c < count ? from[c] : 1.0f;
    }
  }
  __device__ __forceinline__ void invert() {
    if constexpr (kInverts) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) inverse[c] = Inverse(1) / Inverse(scale[c]);
    }
  }
  __device__ __forceinline__ uint32_t scaled(uint32_t w, int p) const {
    constexpr int kWeights = Piece<T>::kWeights;
    const int c = p * kWeights;
    return Piece<T>::scaled(w, scale[kScalesRows ? 0 : c], scale[kScalesRows ? 0 : c + kWeights - 1]);
  }
  __device__ __forceinline__ uint32_t unscaled(uint32_t w, int p) const {
    constexpr int kWeights = Piece<T>::kWeights;
    const int c = p * kWeights;
    return Piece<T>::unscaled(w, inverse[kScalesRows ? 0 : c], inverse[kScalesRows ? 0 : c + kWeights - 1]);
  }
};

// Where in a weight a thread is. A block's rows are of one group, so that its columns have one scale.
struct Place {
  int64_t col, units;
  int count;  // of its columns that there are

  __device__ __forceinline__ explicit Place(const Args& args) {
    col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kColumns;
    units = ceil_div<int64_t>(args.cols, kUnit);
    const int64_t left = args.cols - col;
    count = left >= kColumns ? kColumns : left > 0 ? int(left) : 0;
  }
};

// A thread's rows in one block of them: first, first + blockDim.y, ..., those below `end`
struct Rows {
  int64_t group, first, end;
  __device__ __forceinline__ Rows(const Args& args, int64_t block) {
    group = args.blocks == args.blocks_a_group ? 0 : block / args.blocks_a_group;
    const int64_t begin = group * args.rows_per_group;
    first = begin + (block - group * args.blocks_a_group) * blockDim.y * kRowsAtOnce + threadIdx.y;
    end = begin + args.rows_per_group;
  }
};

__device__ __forceinline__ int16_t* counts(const Args& args) { return args.workspace + 4; }
__device__ __forceinline__ unsigned long long* total(const Args& args) {
  return reinterpret_cast<unsigned long long*>(args.workspace);
}

// Puts back the bits of those weights that the old scale made escapes of. Positions ascend.
template <typename T>
__device__ __forceinline__ void put_old_escapes(const Args& args, int64_t position, int count, Columns<T>& w) {
  int64_t at = 0;
  for (int64_t end = args.escapes; at < end;) {
    const int64_t middle = (at + end) / 2;
    if (args.positions[middle] < position) {
      at = middle + 1;
    } else {
      end = middle;
    }
  }
  for (; at < args.escapes && args.positions[at] < position + count; ++at) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (args.positions[at] == position + c) w.set(c, static_cast<const typename Columns<T>::Word*>(args.bits)[at]);
  }
}

// Bit c of `mask`: column c of this thread is an escape. Returns how many the warp has; writes them, if asked to.
template <typename T>
__device__ __forceinline__ int collect(const Args& args, int64_t position, int64_t unit, uint32_t mask,
                                       const Columns<T>& w) {
  const uint32_t lanes_before = (1u << threadIdx.x % 32) - 1u;
  int before = 0, all = 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const uint32_t lanes = __ballot_sync(kWarp, mask >> c & 1u);
    before += __popc(lanes & lanes_before);
    all += __popc(lanes);
  }
  if (args.mode != IA3_EXACT_COLLECT) return all;
  int64_t at = args.offsets[unit] - all + before;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if ((mask >> c & 1u) == 0) continue;
    args.new_positions[at] = position + c;
    static_cast<typename Columns<T>::Word*>(args.new_bits)[at++] = w.get(c);
  }
  return all;
}

template <typename T, bool kWide, bool kScalesRows, Step kStep>
__global__ void __launch_bounds__(kThreads) exact_scale_kernel(const __grid_constant__ Args args) {
  constexpr bool kTakesOut = kStep != Step::kMerge, kPutsIn = kStep != Step::kUnmerge;
  const Place here(args);
  T* const weight = static_cast<T*>(args.weight) + here.col;
  uint8_t* const parity = args.parity + here.col / kColumns;
  const int64_t parity_stride = ceil_div<int64_t>(args.cols, kColumns);
  Factors<T, kWide, kScalesRows, true> old_factors, new_factors;
  // Of a swap by columns, whose factors take as long to compute as four rows of weights: kept until the group changes
  constexpr bool kKeepsFactors = !kScalesRows && kStep == Step::kSwap;
  int64_t group = -1;
  for (int64_t block = blockIdx.y; block < args.blocks; block += gridDim.y) {
    const Rows rows(args, block);
    const bool is_other_group = !kScalesRows && (!kKeepsFactors || rows.group != group);
    if constexpr (kKeepsFactors) group = rows.group;
    if (is_other_group && here.count != 0) {
      if constexpr (kTakesOut) old_factors.load(args.old_scale + rows.group * args.cols + here.col, here.count);
      if constexpr (kPutsIn) new_factors.load(args.new_scale + rows.group * args.cols + here.col, here.count);
    }
    Columns<T> w[kRowsAtOnce];
    uint32_t odd[kRowsAtOnce];
    float old_scale[kRowsAtOnce], new_scale[kRowsAtOnce];
    bool is_visited[kRowsAtOnce];  // alike in a warp
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t row = rows.first + i * int64_t(blockDim.y);
      is_visited[i] = row < rows.end;
      if (args.mode != IA3_EXACT_MOVE && is_visited[i]) {
        const bool has_escapes = counts(args)[row * here.units + here.col / kUnit] > 0;
        is_visited[i] = has_escapes == (args.mode == IA3_EXACT_COLLECT);
      }
      if (!is_visited[i] || here.count == 0) continue;
      w[i].template load<kWide>(weight + row * args.weight_stride, here.count);
      if constexpr (kTakesOut) odd[i] = parity[row * parity_stride];
      if constexpr (kScalesRows && kTakesOut) old_scale[i] = args.old_scale[row];
      if constexpr (kScalesRows && kPutsIn) new_scale[i] = args.new_scale[row];
    }
    // Divisions have branches, which no load is moved across.
    if (is_other_group) {
      if constexpr (kTakesOut) old_factors.invert();
      if constexpr (kPutsIn) new_factors.invert();
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (!is_visited[i]) continue;
      const int64_t row = rows.first + i * int64_t(blockDim.y);
      const int64_t position = row * args.cols + here.col, unit = row * here.units + here.col / kUnit;
      if constexpr (kScalesRows && kTakesOut) old_factors.scale[0] = old_scale[i], old_factors.invert();
      if constexpr (kScalesRows && kPutsIn) new_factors.scale[0] = new_scale[i], new_factors.invert();
      if constexpr (kTakesOut) {
#pragma unroll
        for (int p = 0; p < kPieces<T>; ++p)
          w[i].pieces[p] = next_of_parity(old_factors.unscaled(w[i].pieces[p], p),
                                          Piece<T>::spread(odd[i] >> p * Piece<T>::kWeights), Piece<T>::kOnes);
        // Units with old escapes have been marked.
        if (args.escapes != 0 && counts(args)[unit] != 0) put_old_escapes(args, position, here.count, w[i]);
      }
      if constexpr (!kPutsIn) {
        if (here.count != 0) w[i].template store<kWide>(weight + row * args.weight_stride, here.count);
      } else {
        if constexpr (!kTakesOut) {
          if (here.count != 0 && args.mode == IA3_EXACT_MOVE) parity[row * parity_stride] = uint8_t(w[i].low_bits());
        }
        Columns<T> after;
        uint32_t wrong[kPieces<T>], is_any_wrong = 0;
#pragma unroll
        for (int p = 0; p < kPieces<T>; ++p) {
          const uint32_t before = w[i].pieces[p];
          after.pieces[p] = new_factors.scaled(before, p);
          const uint32_t quotient = new_factors.unscaled(after.pieces[p], p);
          // The pattern after the largest NaN is that of -0, so no NaN may count as undone; nor may one that came in,
          // whose pattern after arithmetic differs between processors.
          wrong[p] = (next_of_parity(quotient, before, Piece<T>::kOnes) ^ before) |
                     exceeds<T>(quotient, Piece<T>::kAboveInfinity);
          is_any_wrong |= wrong[p];
        }
        uint32_t mask = 0;
        if (is_any_wrong != 0) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const uint32_t bits = wrong[c / Piece<T>::kWeights] >> c % Piece<T>::kWeights * 16;
            if (c < here.count && typename Piece<T>::Word(bits) != 0) mask |= 1u << c;
          }
        }
        const bool has_escapes = args.mode != IA3_EXACT_TAKE_BACK && __ballot_sync(kWarp, mask != 0) != 0;
        if (has_escapes) {
          const int found = collect(args, position, unit, mask, w[i]);
          if (args.mode == IA3_EXACT_MOVE) {
            if (threadIdx.x % 32 == 0) {
              counts(args)[unit] = int16_t(found);
              atomicAdd(total(args), static_cast<unsigned long long>(found));
            }
            continue;
          }
        } else if (kTakesOut && args.escapes != 0 && threadIdx.x % 32 == 0) {
          counts(args)[unit] = 0;
        }
        if (here.count != 0) after.template store<kWide>(weight + row * args.weight_stride, here.count);
      }
    }
  }
}

// Marks the units that hold escapes of the old scale; all write the same.
__global__ void __launch_bounds__(kThreads) mark_units_kernel(const __grid_constant__ Args args) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.escapes) return;
  const int64_t row = args.positions[i] / args.cols, units = (args.cols + kUnit - 1) / kUnit;
  if (row >= 0 && row < args.rows) counts(args)[row * units + args.positions[i] % args.cols / kUnit] = -1;
}

// Whether a scaled weight would be finite; reads b bytes a weight.
template <typename T, bool kWide, bool kScalesRows>
__global__ void __launch_bounds__(kThreads) stays_finite_kernel(const __grid_constant__ Args args) {
  const Place here(args);
  if (here.count == 0) return;
  const T* const weight = static_cast<const T*>(args.weight) + here.col;
  Factors<T, kWide, kScalesRows, false> factors;
  uint32_t unbounded = 0;
  for (int64_t block = blockIdx.y; block < args.blocks; block += gridDim.y) {
    const Rows rows(args, block);
    if constexpr (!kScalesRows) factors.load(args.new_scale + rows.group * args.cols + here.col, here.count);
    Columns<T> w[kRowsAtOnce];
    float scale[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t row = rows.first + i * int64_t(blockDim.y);
      if (row >= rows.end) continue;
      w[i].template load<kWide>(weight + row * args.weight_stride, here.count);
      if constexpr (kScalesRows) scale[i] = args.new_scale[row];
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (rows.first + i * int64_t(blockDim.y) >= rows.end) continue;
      if constexpr (kScalesRows) factors.scale[0] = scale[i];
#pragma unroll
      for (int p = 0; p < kPieces<T>; ++p) {
        // The columns beyond the last are zero, and infinity times zero is none of the weight's affair.
        uint32_t valid = Piece<T>::kSigns;
        if constexpr (!kWide) {
          valid = 0;
          for (int c = 0; c < Piece<T>::kWeights; ++c)
            if (p * Piece<T>::kWeights + c < here.count) valid |= sizeof(T) == 4 ? 0x80000000u : 0x8000u << 16 * c;
        }
        unbounded |= exceeds<T>(factors.scaled(w[i].pieces[p], p), Piece<T>::kAboveFinite) & valid;
      }
    }
  }
  if (unbounded != 0) *reinterpret_cast<uint8_t*>(args.workspace) = 0;
}

// --- launching ----------------------------------------------------------------------------------------------------

template <typename T, bool kWide>
ia3_status run(const ia3_exact_scale_args& given, ia3_stream stream) {
  const Tiling tiling = tile(given.rows_per_group, ceil_div<int64_t>(given.cols, kColumns), kRowsAtOnce);
  Args args{given};
  args.blocks_a_group = ceil_div<int64_t>(given.rows_per_group, int64_t(tiling.block.y) * kRowsAtOnce);
  args.blocks = args.blocks_a_group * (given.rows / given.rows_per_group);
  int64_t blocks = args.blocks;
  // A swap by columns visits several blocks of rows in a row, for its factors' sake; but a GPU wants to be filled.
  if (!args.scales_rows && args.old_scale != nullptr && args.new_scale != nullptr)
    blocks = std::max(ceil_div(blocks, kBlocksInARow), std::min(blocks, kManyBlocks / tiling.grid.x + 1));
  const dim3 grid(tiling.grid.x, unsigned(std::min(blocks, kMaxGridY)));
  const auto start = [&](auto by_row, auto by_column) {
    return launch(args.scales_rows ? by_row : by_column, grid, tiling.block, args, stream);
  };
  if (args.mode == IA3_EXACT_CHECK)
    return start(stays_finite_kernel<T, kWide, true>, stays_finite_kernel<T, kWide, false>);
  if (args.new_scale == nullptr)
    return start(exact_scale_kernel<T, kWide, true, Step::kUnmerge>,
                 exact_scale_kernel<T, kWide, false, Step::kUnmerge>);
  if (args.old_scale == nullptr)
    return start(exact_scale_kernel<T, kWide, true, Step::kMerge>, exact_scale_kernel<T, kWide, false, Step::kMerge>);
  return start(exact_scale_kernel<T, kWide, true, Step::kSwap>, exact_scale_kernel<T, kWide, false, Step::kSwap>);
}

// What is written before the weight is visited
ia3_status prepare(const ia3_exact_scale_args& args, ia3_stream stream) {
  if (args.mode == IA3_EXACT_CHECK) return checked(cudaMemsetAsync(args.workspace, 1, 1, stream));
  if (args.mode != IA3_EXACT_MOVE || args.workspace == nullptr) return IA3_OK;
  const size_t bytes = 8 + 2 * size_t(args.rows) * size_t(ceil_div<int64_t>(args.cols, kUnit));
  const ia3_status status = checked(cudaMemsetAsync(args.workspace, 0, bytes, stream));
  if (status != IA3_OK || args.escapes == 0) return status;
  return launch(mark_units_kernel, dim3(unsigned(ceil_div<int64_t>(args.escapes, kThreads))), dim3(kThreads),
                Args{args}, stream);
}

ia3_status check_pointers(const ia3_exact_scale_args& args) {
  const bool is_check = args.mode == IA3_EXACT_CHECK;
  if (args.rows == 0 || args.cols == 0) return IA3_OK;
  if (args.mode < IA3_EXACT_MOVE || args.mode > IA3_EXACT_CHECK)
    return fail(IA3_INVALID, "mode is %d; expected an ia3_exact_mode, 0 to 3.", int(args.mode));
  if (args.old_scale == nullptr && args.new_scale == nullptr)
    return fail(IA3_INVALID, "old_scale and new_scale are both null; expected one of them.");
  if (args.rows_per_group < 1 || args.rows % args.rows_per_group != 0)
    return fail(IA3_INVALID, "rows_per_group is %lld; expected a divisor of the %lld rows.",
                static_cast<long long>(args.rows_per_group), static_cast<long long>(args.rows));
  const char* const missing = !is_check && args.parity == nullptr                          ? "parity"
                              : is_check && args.new_scale == nullptr                      ? "new_scale"
                              : args.escapes != 0 && args.positions == nullptr             ? "positions"
                              : args.escapes != 0 && args.bits == nullptr                  ? "bits"
                              : args.mode == IA3_EXACT_COLLECT && args.offsets == nullptr  ? "offsets"
                              : args.mode == IA3_EXACT_COLLECT && !args.new_positions      ? "new_positions"
                              : args.mode == IA3_EXACT_COLLECT && args.new_bits == nullptr ? "new_bits"
                              : args.workspace == nullptr && (args.new_scale || args.escapes != 0 || args.mode != 0)
                                  ? "workspace"
                                  : nullptr;
  if (missing != nullptr) return fail(IA3_INVALID, "%s is null; expected a pointer, for what is asked.", missing);
  return IA3_OK;
}

}  // namespace
}  // namespace ia3::cuda

ia3_status ia3_cuda_exact_scale(const ia3_exact_scale_args* args, ia3_stream stream) {
  using namespace ia3::cuda;
  const bool is_written = args->mode != IA3_EXACT_CHECK;
  const ia3_status status =
      last_failure({check_pointers(*args),
                    check_matrix({"weight", args->weight, args->weight_stride}, args->rows, args->cols, is_written),
                    check_dtype(args->dtype), check_sizes(args->rows, args->cols)});
  if (status != IA3_OK) return status;
  if (args->rows == 0 || args->cols == 0) return IA3_OK;
  const ia3_status prepared = prepare(*args, stream);
  if (prepared != IA3_OK) return prepared;
  return visit_dtype(args->dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = args->cols % kColumns == 0 &&
                         (args->scales_rows || (is_on_16_bytes(args->old_scale) && is_on_16_bytes(args->new_scale))) &&
                         are_rows_on_16_bytes(sizeof(T), {{"weight", args->weight, args->weight_stride}});
    return is_wide ? run<T, true>(*args, stream) : run<T, false>(*args, stream);
  });
}
