#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace ia3::cuda {
namespace {

thread_local char last_error[256] = "";

}  // namespace

ia3_status fail(ia3_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

ia3_status checked(cudaError_t error) {
  if (error == cudaSuccess) return IA3_OK;
  return fail(IA3_CUDA_ERROR, "CUDA refused: %s (%s).", cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace ia3::cuda

const char* ia3_last_error(void) { return ia3::cuda::last_error; }

const char* ia3_cuda_sources(void) { return IA3_CUDA_SOURCES; }

// The list of CMakeLists.txt, as numbers
const int* ia3_cuda_architectures(void) {
  static const int architectures[] = {IA3_CUDA_ARCHITECTURES, 0};
  return architectures;
}

// The runtime cannot say it of the legacy stream while another one is captured: an error, and not one of a launch.
int ia3_cuda_is_capturing(ia3_stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status == cudaStreamCaptureStatusActive;
  cudaGetLastError();
  return 0;
}
