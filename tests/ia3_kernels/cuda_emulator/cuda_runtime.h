// CUDA C++ for a host compiler: what csrc/cuda uses of the language, so that tests run its kernels without a GPU.
//
// A launch runs its blocks one after the other, in an order that a seed decides, as it decides which warp goes first: a
// result that depends on either is wrong on a GPU as well. A block's threads are fibers; each runs until it waits for
// others, be it its warp's to vote. Shared memory holds NaN when a block begins. What makes no sense on a GPU (threads that wait at different
// places, or leave while others wait) ends the process with a sentence.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using std::max;
using std::min;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;

// Set by tests. The first also shuffles the warps of a block.
inline unsigned order_seed = 0;
inline bool next_launch_fails = false;
inline int64_t launches = 0;

[[noreturn]] inline void stop(const char* sentence) {
  std::fprintf(stderr, "emulator: %s\n", sentence);
  std::abort();
}

inline void check_alignment(const void* pointer, size_t size) {
  if (reinterpret_cast<uintptr_t>(pointer) % size != 0) stop("an address is no multiple of what is accessed there");
}

// --- a block ------------------------------------------------------------------------------------------------------

enum class Waits { kNothing, kWarp, kBlock, kDone };

struct Thread {
  dim3 index;
  Waits waits;
  bool vote = false;
  unsigned ballot = 0;
};

inline std::vector<Thread> threads;
inline int current = 0;
inline char shared_memory[48 * 1024];
inline size_t shared_used = 0;
inline std::vector<const void*> shared_names;
inline std::vector<void*> shared_places;

inline Thread& self() { return threads[size_t(current)]; }

inline void wait(Waits what) {
  self().waits = what;
  fibers::yield();
}

// Storage of a block's variable, which is known by its name. No two blocks run at a time.
inline void* shared(const void* name, size_t size) {
  for (size_t i = 0; i < shared_names.size(); ++i)
    if (shared_names[i] == name) return shared_places[i];
  const size_t begin = (shared_used + 15) / 16 * 16;
  if (begin + size > sizeof(shared_memory)) stop("a block has 48 KiB of shared memory");
  shared_used = begin + size;
  shared_names.push_back(name);
  shared_places.push_back(shared_memory + begin);
  return shared_places.back();
}

// Lets the threads go on that wait for each other, if all do. Whether any went on.
inline bool release() {
  for (const Thread& thread : threads)
    if (thread.waits != Waits::kBlock) return false;
  for (Thread& thread : threads) thread.waits = Waits::kNothing;
  return true;
}

// Lets a warp go on whose threads all wait for each other's votes. Whether it does; some alone never may.
inline bool release_warp(int first, int last) {
  unsigned ballot = 0;
  int waiting = 0;
  for (int i = first; i < last; ++i) {
    if (threads[size_t(i)].waits != Waits::kWarp) continue;
    ++waiting;
    ballot |= unsigned(threads[size_t(i)].vote) << (i - first);
  }
  if (waiting == 0) return false;
  if (waiting != kWarp) stop("the threads of a warp vote at different places");
  for (int i = first; i < last; ++i) threads[size_t(i)].waits = Waits::kNothing, threads[size_t(i)].ballot = ballot;
  return true;
}

inline void run_block(void (*body)(const void*), const void* argument, std::minstd_rand& random) {
  const int count = int(blockDim.x * blockDim.y * blockDim.z), warps = (count + kWarp - 1) / kWarp;
  std::fill(std::begin(shared_memory), std::end(shared_memory), char(0xff));  // NaN, and true
  shared_used = 0;
  shared_names.clear();
  shared_places.clear();
  threads.resize(size_t(count));
  for (int i = 0; i < count; ++i) {
    const unsigned x = unsigned(i) % blockDim.x, rest = unsigned(i) / blockDim.x;
    threads[size_t(i)] = {dim3(x, rest % blockDim.y, rest / blockDim.y), Waits::kNothing};
    fibers::start(i, body, argument, [] { self().waits = Waits::kDone; });
  }
  std::vector<int> order(static_cast<size_t>(warps));
  std::iota(order.begin(), order.end(), 0);
  for (int done = 0; done < count;) {
    bool went_on = false;
    if (order_seed != 0) std::shuffle(order.begin(), order.end(), random);
    for (const int warp : order) {
      const int first = warp * kWarp, last = std::min(first + kWarp, count);
      do {
        for (int i = first; i < last; ++i) {
          if (threads[size_t(i)].waits != Waits::kNothing) continue;
          current = i;
          threadIdx = threads[size_t(i)].index;
          fibers::resume(i);
          went_on = true;
          done += threads[size_t(i)].waits == Waits::kDone;
        }
      } while (release_warp(first, last));
    }
    if (!release() && !went_on) stop("the threads of a block wait at different places");
  }
}

// --- a launch -----------------------------------------------------------------------------------------------------

inline cudaError_t refuse(cudaError_t error) { return last_error = error; }

template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, dim3 block, const void* argument) {
  ++launches;
  last_error = cudaSuccess;
  if (next_launch_fails) return next_launch_fails = false, refuse(cudaErrorLaunchFailure);
  const int64_t threads_a_block = int64_t(block.x) * block.y * block.z;
  if (threads_a_block == 0 || threads_a_block > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 ||
      grid.y > 65535 || grid.z != 1)
    return refuse(cudaErrorInvalidConfiguration);
  struct Call {
    void (*kernel)(Args);
    const Args* args;
  } call{kernel, static_cast<const Args*>(argument)};
  const auto body = [](const void* data) {
    const Call& called = *static_cast<const Call*>(data);
    called.kernel(*called.args);
  };
  gridDim = grid;
  blockDim = block;
  std::minstd_rand random(order_seed);
  std::vector<int64_t> order(size_t(grid.x) * grid.y);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), random);
  for (const int64_t i : order) {
    blockIdx = dim3(unsigned(i % grid.x), unsigned(i / grid.x));
    run_block(body, &call, random);
  }
  return cudaSuccess;
}

}  // namespace emulator

#define IA3_SHARED(type, name) \
  static char name##_of_block; \
  type& name = *static_cast<type*>(emulator::shared(&name##_of_block, sizeof(type)))

inline void __syncthreads() { emulator::wait(emulator::Waits::kBlock); }
inline void __threadfence() {}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  if (mask != 0xffffffffu) emulator::stop("only whole warps vote here");
  emulator::self().vote = vote;
  emulator::wait(emulator::Waits::kWarp);
  return emulator::self().ballot;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename Integer>
Integer atomicAdd(Integer* place, Integer value) {
  const Integer before = *place;
  *place += value;
  return before;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

template <typename Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  return emulator::launch(kernel, grid, block, arguments[0]);
}
