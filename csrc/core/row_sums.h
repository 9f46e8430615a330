// Sums over the rows of a chunk, which backward kernels keep a row of, in cache, while they walk down the rows.
#pragma once

#include <type_traits>

#include "types.h"
#include "vec.h"

namespace ia3::IA3_ISA {

// sum <- sum + term for the columns of one vector; the first row of a chunk overwrites what is there.
//
// Terms that come from bf16 values are no better than bf16; for the finer types the running sum carries its rounding
// error along in `lost` (Kahan), or a plain sum over a chunk would err more than torch's pairwise one.
template <typename T, typename Width>
inline void add_to_row_sum(float* sum, float* lost, Vec term, bool is_first, Width n) {
  constexpr bool kCompensated = !std::is_same_v<T, BFloat16>;
  if (is_first) {
    store(sum, term, n);
    if constexpr (kCompensated) store(lost, broadcast(0.0f), n);
  } else if constexpr (kCompensated) {
    const Vec before = load(sum, n);
    const Vec addend = term - load(lost, n);
    const Vec after = before + addend;
    store(lost, (after - before) - addend, n);
    store(sum, after, n);
  } else {
    store(sum, load(sum, n) + term, n);
  }
}

}  // namespace ia3::IA3_ISA
