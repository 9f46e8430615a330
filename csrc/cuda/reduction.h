// Sums over the rows of a matrix, for kernels whose blocks take a chunk of rows and a strip of columns each.
//
// Two stages and no atomics on values. The warps' sums meet in shared memory, the chunks' sums in the workspace, where
// the block that comes last adds them up in the order of the chunks: which block that is changes nothing in the result.
#pragma once

#include "../core/elementwise.h"
#include "instructions.h"
#include "launch.h"

namespace ia3::cuda {

// A block is kLanes x kWarps threads: a warp stays in its columns and takes every kWarps-th row of the chunk.
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;

// Where the sums of a block go: kVectors of them, over the same rows
template <int kVectors>
struct Reduction {
  int64_t chunk;              // the block's
  int64_t first, last;        // the chunks that are added up, with this one among them
  int64_t cols, strip;        // of the matrix; the first of the block's
  unsigned int* arrival;      // of the strip and these chunks: how many of them have their sums in `partials`
  float* partials[kVectors];  // [chunks, cols]
  float* results[kVectors];   // [cols]; null: not wanted
};

template <int kVectors, int kSize>
struct alignas(16) WarpSums {
  float values[kVectors][kWarps][kLanes * kSize];
};

// The sums over warps of what their lanes hold, for the column of the strip that this thread owns: thread t's is t
template <int kVectors, int kSize>
__device__ __forceinline__ void sum_over_warps(WarpSums<kVectors, kSize>& sums,
                                               const elementwise::Sum (&mine)[kVectors][kSize],
                                               float (&shares)[kVectors]) {
  const int thread = int(threadIdx.y) * kLanes + int(threadIdx.x);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      sums.values[v][threadIdx.y][threadIdx.x * kSize + j] = mine[v][j].total - mine[v][j].lost;
  __syncthreads();
  if (thread >= kLanes * kSize) return;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float total[kWarps];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total[warp] = sums.values[v][warp][thread];
#pragma unroll
    for (int half = kWarps / 2; half > 0; half /= 2)
#pragma unroll
      for (int warp = 0; warp < half; ++warp) total[warp] += total[warp + half];
    shares[v] = total[0];
  }
}

// Both stages of the block's sums: `mine` are this thread's, of the kSize columns from strip + threadIdx.x kSize on.
template <int kVectors, int kSize>
__device__ __forceinline__ void reduce(const Reduction<kVectors>& r, const elementwise::Sum (&mine)[kVectors][kSize]) {
  using Sums = WarpSums<kVectors, kSize>;
  IA3_SHARED(Sums, sums);
  IA3_SHARED(bool, is_last);
  const int thread = int(threadIdx.y) * kLanes + int(threadIdx.x);
  const bool owns = thread < kLanes * kSize && r.strip + thread < r.cols;
  float shares[kVectors] = {};
  sum_over_warps(sums, mine, shares);
  const bool is_whole = r.last - r.first <= 1;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!owns || r.results[v] == nullptr) continue;
    float* to = is_whole ? r.results[v] : r.partials[v] + r.chunk * r.cols;
    to[r.strip + thread] = shares[v];
  }
  if (is_whole) return;
  __threadfence();  // the shares are visible before the arrival is
  __syncthreads();
  if (thread == 0) is_last = int64_t(atomicAdd(r.arrival, 1u)) == r.last - r.first - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  elementwise::Sum totals[kVectors][kSize];
  const int64_t col = r.strip + int64_t(threadIdx.x) * kSize;
  if (col < r.cols) {
    for (int64_t other = r.first + threadIdx.y; other < r.last; other += kWarps) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (r.results[v] == nullptr) continue;
        float part[kSize];
        load_shared_floats(r.partials[v] + other * r.cols + col, part);
#pragma unroll
        for (int j = 0; j < kSize; ++j) totals[v][j].add(part[j]);
      }
    }
  }
  sum_over_warps(sums, totals, shares);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (owns && r.results[v] != nullptr) r.results[v][r.strip + thread] = shares[v];
}

// --- host ---------------------------------------------------------------------------------------------------------

// Rows of a chunk, a function of type and shape alone: the workspace's size and a sum's bits depend on it.
inline int64_t rows_per_chunk(ia3_dtype dtype, int64_t rows, int64_t cols) {
  const int64_t wide = dtype == IA3_FLOAT32 ? kWide<float> : kWide<BFloat16>;
  return elementwise::rows_per_chunk(rows, ceil_div<int64_t>(cols, kLanes * wide));
}

// The strips of columns of a launch with a block for each of them and each chunk
inline ia3_status count_strips(int64_t cols, int size, int64_t chunks, unsigned int& strips) {
  const int64_t count = ceil_div<int64_t>(cols, int64_t(kLanes) * size);
  if (count > INT32_MAX / chunks)
    return fail(IA3_UNSUPPORTED, "there are %lld chunks of %lld columns; expected no more than a grid has blocks for.",
                static_cast<long long>(chunks), static_cast<long long>(cols));
  strips = unsigned(count);
  return IA3_OK;
}

// Parts of a workspace in bytes, in this order; nothing where one chunk is all there is
struct ReductionBytes {
  size_t arrivals = 0, partials = 0;
};

// counters: of a strip; partials: rows of them, of all chunks and vectors
inline ReductionBytes reduction_bytes(int64_t cols, int64_t counters, int64_t partials) {
  const int64_t strips = ceil_div<int64_t>(cols, kLanes);  // of the path that is not wide, which has the most
  return {size_t(ceil_div<int64_t>(strips * counters * int64_t(sizeof(unsigned int)), 16) * 16),
          size_t(partials * cols) * sizeof(float)};
}

// Checks the workspace, finds the parts in it, and puts zeroing the counters on the stream.
inline ia3_status prepare_reduction(const ReductionBytes& bytes, void* workspace, ia3_stream stream,
                                    unsigned int*& arrivals, float*& partials) {
  if (bytes.partials == 0) return IA3_OK;
  if (workspace == nullptr || !is_on_16_bytes(workspace))
    return fail(IA3_INVALID, "workspace is %p; expected %zu bytes on a multiple of 16.", workspace,
                bytes.arrivals + bytes.partials);
  arrivals = static_cast<unsigned int*>(workspace);
  partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + bytes.arrivals);
  return checked(cudaMemsetAsync(arrivals, 0, bytes.arrivals, stream));
}

}  // namespace ia3::cuda
