// The kernels of one instruction set behind plain function pointers, and the choice among the sets at run time.
//
// Every function works on a range of rows or outputs, so that the caller owns the threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/arguments.h"

namespace ia3::cpu {

struct Kernels {
  const char* isa;

  void (*activation)(const ActivationArgs&, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end);

  // `lost` is scratch for the columns of this call
  void (*activation_backward)(const ActivationGradArgs&, const int64_t* rows, const float* scale, float* partial,
                              float* lost, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end);

  void (*scale_pair)(const ScalePairArgs&, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end);

  // Partial sums of ds_a and ds_b, [cols] each, or null. `lost` is scratch for twice the columns of this call.
  void (*scale_pair_backward)(const ScalePairGradArgs&, float* const (&partials)[2], float* lost, int64_t row_begin,
                              int64_t row_end, int64_t col_begin, int64_t col_end);

  void (*scale_weight)(DType, void* weight, int64_t stride, int64_t cols, const float* row_scale,
                       const float* col_scale, int64_t row_begin, int64_t row_end);

  // Returns the number of escapes; see core/exact_scale.h.
  int64_t (*merge_exact)(const ExactScaleArgs&, int64_t row_begin, int64_t row_end, Escape* escapes);

  void (*unmerge_exact)(const ExactScaleArgs&, int64_t row_begin, int64_t row_end);

  bool (*stays_finite)(const ExactScaleArgs&, int64_t row_begin, int64_t row_end);

  void (*widen)(DType, const void* x, int64_t stride, int64_t cols, const RowScales*, float* out, int64_t row_begin,
                int64_t row_end);

  void (*small_linear)(const LinearArgs&, int64_t out_begin, int64_t out_end);

  // What `pack_rows` writes, for all rows: blocks of `depth` inputs, each [rows][depth]. `blocked_linear` takes panels
  // of `lanes` outputs, and scratch for `group` panels a row.
  struct {
    int64_t depth, lanes, group, tile_rows;
  } blocking;

  void (*pack_rows)(DType, const void* x, int64_t stride, int64_t in, const RowScales*, int64_t rows, float* out,
                    int64_t row_begin, int64_t row_end);

  void (*blocked_linear)(const LinearArgs&, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                         float* sums);
};

// What an environment variable says, in small letters, without spaces, and with '?' for whatever is no ASCII; "auto"
// where it says nothing.
std::string environment_word(const char* variable);

// The best set that this processor runs, or the one that the environment variable IA3_CPU_ISA names. Throws
// std::runtime_error, with a sentence, if that one is unknown or does not run here. The choice is made once.
const Kernels& kernels();

// Whether the processor multiplies 16-bit matrices in instructions faster than fp32 ones, so that a library that uses
// them beats fp32 arithmetic on widened operands.
struct FastMatmul {
  bool bfloat16, float16;
};

FastMatmul fast_matmul();

// The names of the sets that this processor runs, best first
std::vector<std::string> available_isas();

}  // namespace ia3::cpu
