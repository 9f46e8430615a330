// The tiles of the Hopper matmul, stated once, and what stands between their kernels and the choice among them.
#pragma once

#include <cstddef>

#include "../include/ia3_kernels.h"

namespace ia3::cuda {

// Inputs that a step of the main loop multiplies: 128 bytes, one row of the widest swizzle of shared memory.
inline constexpr int kHopperStep = 64;

// Thread blocks of a cluster, one below the other: they multiply the same rows of the weight, each loads half of them.
inline constexpr int kHopperCluster = 2;

enum class Schedule {
  kCooperative,  // two warpgroups share a tile: the largest tile, but nothing hides its epilogue
  kPingpong,     // two warpgroups, a tile each: one multiplies while the other stores
};

struct HopperTile {
  const char* name;
  int rows;     // of y, computed by a thread block at a time
  int outputs;  // columns of y
  Schedule schedule;
};

// Each was the fastest of all routes for some shape on an H100 (bench/results). A multiprocessor loads 16-bit operands
// of 128 (rows + outputs) bytes for rows x outputs x 64 / 2048 clocks of multiplying: the largest is the one to take
// where it fills the device, the others fill it with fewer rows. Which one a shape takes is measured:
// ia3_kernels/routes.py.
inline constexpr HopperTile kHopperTiles[] = {
    {"128x256x64 cooperative", 128, 256, Schedule::kCooperative},
    {"128x128x64 pingpong", 128, 128, Schedule::kPingpong},
    {"64x128x64 pingpong", 64, 128, Schedule::kPingpong},
};
inline constexpr int kHopperTileCount = sizeof(kHopperTiles) / sizeof(kHopperTiles[0]);

struct HopperLaunch {
  int multiprocessors;
  int swizzle;  // tiles across, before the order of tiles goes one down
};

// Instantiated in hopper_linear.cu, which is compiled once per tile. The arguments have been checked.
template <int kTile, ia3_dtype kDType>
struct HopperKernel {
  static ia3_status run(const ia3_hopper_linear_args& args, const HopperLaunch& launch, ia3_stream stream);
};

}  // namespace ia3::cuda
