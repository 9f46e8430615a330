// What the functions of ia3_kernels.h answer: a status, and a sentence about it.
#pragma once

#include <cuda_runtime_api.h>

#include "../include/ia3_kernels.h"

namespace ia3::cuda {

// Keeps the sentence for ia3_last_error(), and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
ia3_status fail(ia3_status status, const char* format, ...);

// What a call of the CUDA runtime means for the caller.
ia3_status checked(cudaError_t error);

}  // namespace ia3::cuda
