// Checks that arguments share, the choice of a kernel by type, and launching it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../core/types.h"
#include "status.h"

namespace ia3::cuda {

// Blocks have 256 threads, which leaves each of them up to 255 registers.
constexpr int kThreads = 256;

// A grid's second and third dimension hold at most this many blocks.
constexpr int64_t kMaxGridY = 65535;

template <typename Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// Kernels take one structure, by value.
template <typename Args>
ia3_status launch(void (*kernel)(Args), dim3 grid, dim3 block, const Args& args, ia3_stream stream) {
  void* arguments[] = {const_cast<Args*>(&args)};
  return checked(cudaLaunchKernel(kernel, grid, block, arguments, 0, stream));
}

// The checks say what is wrong with the arguments, each in a sentence of its own. The last one that fails is the one
// that ia3_last_error() gives, so the most telling check goes last.
inline ia3_status last_failure(std::initializer_list<ia3_status> statuses) {
  ia3_status failure = IA3_OK;
  for (const ia3_status status : statuses)
    if (status != IA3_OK) failure = status;
  return failure;
}

inline ia3_status check_dtype(ia3_dtype dtype) {
  if (dtype >= IA3_FLOAT32 && dtype <= IA3_FLOAT16) return IA3_OK;
  return fail(IA3_INVALID, "dtype is %d; expected an ia3_dtype, 0 to 2.", int(dtype));
}

inline ia3_status check_activation(ia3_activation activation) {
  if (activation >= IA3_SILU && activation <= IA3_IDENTITY) return IA3_OK;
  return fail(IA3_INVALID, "activation is %d; expected an ia3_activation, 0 to 5.", int(activation));
}

inline ia3_status check_sizes(int64_t rows, int64_t cols) {
  if (rows >= 0 && cols >= 0) return IA3_OK;
  return fail(IA3_INVALID, "the matrix is %lld x %lld; expected sizes of 0 or more.", static_cast<long long>(rows),
              static_cast<long long>(cols));
}

// Calls visitor(T{}) for the element type.
template <typename Visitor>
ia3_status visit_dtype(ia3_dtype dtype, Visitor visitor) {
  switch (dtype) {
    case IA3_FLOAT32:
      return visitor(float{});
    case IA3_BFLOAT16:
      return visitor(BFloat16{});
    case IA3_FLOAT16:
      return visitor(Float16{});
  }
  return check_dtype(dtype);
}

// Calls visitor with the activation as a constant.
template <typename Visitor>
ia3_status visit_activation(ia3_activation activation, Visitor visitor) {
  switch (activation) {
    case IA3_SILU:
      return visitor(std::integral_constant<int, IA3_SILU>{});
    case IA3_GELU:
      return visitor(std::integral_constant<int, IA3_GELU>{});
    case IA3_GELU_TANH:
      return visitor(std::integral_constant<int, IA3_GELU_TANH>{});
    case IA3_RELU:
      return visitor(std::integral_constant<int, IA3_RELU>{});
    case IA3_RELU2:
      return visitor(std::integral_constant<int, IA3_RELU2>{});
    case IA3_IDENTITY:
      return visitor(std::integral_constant<int, IA3_IDENTITY>{});
  }
  return check_activation(activation);
}

// A matrix as it comes in, with its name for error messages
struct Matrix {
  const char* name;
  const void* pointer;
  int64_t stride;
};

inline bool is_on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether every row of every matrix begins on 16 bytes; absent ones do.
inline bool are_rows_on_16_bytes(int64_t element_size, std::initializer_list<Matrix> matrices) {
  for (const Matrix& matrix : matrices) {
    if (matrix.pointer == nullptr) continue;
    if (!is_on_16_bytes(matrix.pointer) || matrix.stride * element_size % 16 != 0) return false;
  }
  return true;
}

// Matrices that are read may repeat a row (stride 0); one that is written must not overlap itself.
inline ia3_status check_matrix(const Matrix& matrix, int64_t rows, int64_t cols, bool is_written) {
  if (rows == 0 || cols == 0) return IA3_OK;
  if (matrix.pointer == nullptr) return fail(IA3_INVALID, "%s is null; expected a matrix.", matrix.name);
  if (matrix.stride < 0 || (is_written && rows > 1 && matrix.stride < cols))
    return fail(IA3_INVALID, "%s has rows of %lld elements, %lld apart; expected a distance of at least %lld.",
                matrix.name, static_cast<long long>(cols), static_cast<long long>(matrix.stride),
                static_cast<long long>(is_written ? cols : 0));
  return IA3_OK;
}

inline ia3_status check_scale(const char* name, const ia3_scale& scale) {
  if (scale.scale != nullptr && scale.index != nullptr && scale.adapters < 1)
    return fail(IA3_INVALID, "%s has an index and %d adapters; expected at least 1.", name, int(scale.adapters));
  return IA3_OK;
}

// A block of the kernels that visit every element once: lanes along a row, the rest of its threads down the rows, each
// at `kRowsAtOnce` rows, so that as many loads are in flight.
struct Tiling {
  dim3 grid, block;
};

inline Tiling tile(int64_t rows, int64_t vectors, int rows_at_once) {
  // The longest stretch of a row that leaves few threads idle at its end: 1/16 of them
  int lanes = kThreads;
  while (lanes > 32 && ceil_div<int64_t>(vectors, lanes) * lanes > vectors + vectors / 16) lanes /= 2;
  const int threads_down = kThreads / lanes;
  const int64_t groups = ceil_div<int64_t>(rows, int64_t(threads_down) * rows_at_once);
  const dim3 grid(unsigned(ceil_div<int64_t>(vectors, lanes)), unsigned(groups < kMaxGridY ? groups : kMaxGridY));
  return {grid, dim3(unsigned(lanes), unsigned(threads_down))};
}

}  // namespace ia3::cuda
