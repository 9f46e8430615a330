// The scale of a row, on the device: see ia3_scale.
#pragma once

#include <cmath>

#include "../include/ia3_kernels.h"
#include "instructions.h"

namespace ia3::cuda {

template <int kSize>
__device__ __forceinline__ void fill(float (&values)[kSize], float value) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] = value;
}

// Columns col .. of the scale of an adapter: ones for -1, NaN for an index that has no row, which is not read.
template <int kSize>
__device__ __forceinline__ void load_adapter(const ia3_scale& scale, int32_t adapter, int64_t cols, int64_t col,
                                             float (&values)[kSize]) {
  if (adapter >= 0 && adapter < scale.adapters) {
    load_floats(scale.scale + adapter * cols + col, values);
  } else {
    fill(values, adapter == -1 ? 1.0f : NAN);
  }
}

// The same of a scale that all rows share
template <int kSize>
__device__ __forceinline__ void load_shared_scale(const ia3_scale& scale, int64_t col, float (&values)[kSize]) {
  if (scale.scale != nullptr) {
    load_floats(scale.scale + col, values);
  } else {
    fill(values, 1.0f);
  }
}

__device__ __forceinline__ bool differs_by_row(const ia3_scale& scale) {
  return scale.scale != nullptr && scale.index != nullptr;
}

}  // namespace ia3::cuda
