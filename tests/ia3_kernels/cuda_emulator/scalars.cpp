// csrc/core/elementwise.h and the emulator's own switches, for ctypes.
#include <cuda_runtime.h>

#include "../../../csrc/core/elementwise.h"
#include "../../../csrc/cuda/instructions.h"

namespace {

template <typename T>
void evaluate(int activation, int64_t count, const float* x, float* value, float* derivative) {
  for (int64_t i = 0; i < count; ++i) {
    const auto both = ia3::elementwise::activate<T>(ia3::Activation(activation), x[i]);
    value[i] = both.value;
    derivative[i] = both.derivative;
  }
}

}  // namespace

extern "C" {

// dtype in the order of ia3_dtype
void emulated_activate(int dtype, int activation, int64_t count, const float* x, float* value, float* derivative) {
  if (dtype == 0) evaluate<float>(activation, count, x, value, derivative);
  if (dtype == 1) evaluate<ia3::BFloat16>(activation, count, x, value, derivative);
  if (dtype == 2) evaluate<ia3::Float16>(activation, count, x, value, derivative);
}

float emulated_sum(int64_t count, const float* terms) {
  ia3::elementwise::Sum sum;
  for (int64_t i = 0; i < count; ++i) sum.add(terms[i]);
  return sum.total - sum.lost;
}

int64_t emulated_rows_per_chunk(int64_t rows, int64_t strips) { return ia3::elementwise::rows_per_chunk(rows, strips); }

// 0: blocks and warps in their order; 1: blocks in reverse, warps shuffled; others: both shuffled
void emulator_set_order(unsigned seed) { emulator::order_seed = seed; }
void emulator_fail_next_launch(void) { emulator::next_launch_fails = true; }
int64_t emulator_launches(void) { return emulator::launches; }
}
