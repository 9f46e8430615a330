// Which arguments the Hopper matmul takes, and in which order its tiles are computed. Plain C++: no kernel is in here.
#include <algorithm>
#include <cinttypes>
#include <utility>

#include "hopper_linear.h"
#include "status.h"

namespace ia3::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// --- the order of tiles ----------------------------------------------------------------------------------------------

// How many tiles wide the order of tiles runs down: a square of tiles shares more operands in the L2 cache than a
// strip. The widest that costs no wave and little padding, whose tiles load operands like the others.
int choose_swizzle(const HopperTile& tile, int64_t rows, int64_t outputs, int multiprocessors) {
  const int64_t down = round_up(ceil_div(rows, tile.rows), kHopperCluster), across = ceil_div(outputs, tile.outputs);
  // Thread blocks that run at a time: one a multiprocessor, in whole clusters
  const int64_t slots = std::max(multiprocessors / kHopperCluster, 1) * kHopperCluster;
  // With the padding to whole swizzles that CUTLASS adds to either side, and multiplies like the rest
  const auto tiles = [&](int swizzle) { return round_up(down, swizzle * kHopperCluster) * round_up(across, swizzle); };
  for (const int swizzle : {8, 4, 2}) {
    const bool fits = std::min(down, across) >= swizzle;  // or CUTLASS takes a narrower one
    const bool costs_a_wave = ceil_div(tiles(swizzle), slots) > ceil_div(tiles(1), slots);
    if (fits && !costs_a_wave && 16 * tiles(swizzle) <= 17 * tiles(1)) return swizzle;
  }
  return 1;
}

// --- the kernels by tile and type ------------------------------------------------------------------------------------

using Run = ia3_status (*)(const ia3_hopper_linear_args&, const HopperLaunch&, ia3_stream);

#if defined(IA3_HOPPER)
constexpr int kBuilt = kHopperTileCount;
#else  // CUTLASS was not found when this was built
constexpr int kBuilt = 0;
#endif

template <ia3_dtype kDType, int... kTiles>
Run kernel_of(int tile, std::integer_sequence<int, kTiles...>) {
  static constexpr Run kernels[] = {HopperKernel<kTiles, kDType>::run..., nullptr};
  return kernels[tile];
}

// --- the arguments ---------------------------------------------------------------------------------------------------

ia3_status check_matrix(const char* name, const void* data, int64_t rows, int64_t cols, int64_t stride) {
  if (data == nullptr) return fail(IA3_INVALID, "%s is null; expected the address of its first row.", name);
  if (rows > 1 && stride < cols) {
    return fail(IA3_INVALID, "%s_stride is %" PRId64 "; expected at least the %" PRId64 " elements of a row.", name,
                stride, cols);
  }
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride % 8 != 0 || stride < cols || stride >= int64_t{1} << 39) {
    return fail(IA3_UNSUPPORTED,
                "%s is at %p with %s_stride %" PRId64
                "; expected a multiple of 16 bytes and one of 8 elements: use "
                "another kernel, or a copy.",
                name, data, name, stride);
  }
  return IA3_OK;
}

ia3_status check_vector(const char* name, const void* data, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(data) % alignment == 0) return IA3_OK;
  return fail(IA3_INVALID, "%s is at %p; expected a multiple of its element's %zu bytes.", name, data, alignment);
}

ia3_status check(const ia3_hopper_linear_args& args) {
  if (args.dtype != IA3_FLOAT32 && args.dtype != IA3_BFLOAT16 && args.dtype != IA3_FLOAT16) {
    return fail(IA3_INVALID, "dtype is %d; expected one of ia3_dtype.", int(args.dtype));
  }
  if (args.rows < 0 || args.in < 0 || args.out < 0) {
    return fail(IA3_INVALID, "rows, in, out are %" PRId64 ", %" PRId64 ", %" PRId64 "; expected none below 0.",
                args.rows, args.in, args.out);
  }
  if (args.tile < 0 || args.tile >= kHopperTileCount) {
    return fail(IA3_INVALID, "tile is %d; expected one of the %d of ia3_cuda_hopper_tiles(), from 0.", args.tile,
                kHopperTileCount);
  }
  if (args.rows == 0 || args.out == 0) return IA3_OK;
  if (args.dtype == IA3_FLOAT32) {
    return fail(IA3_UNSUPPORTED, "dtype is fp32; expected bf16 or fp16: use another kernel.");
  }
  constexpr int64_t kMost = int64_t{1} << 30;  // CUTLASS counts in int, and rounds up to tiles
  if (args.in == 0 || args.in % 8 != 0 || args.out % 8 != 0 || std::max({args.rows, args.in, args.out}) > kMost) {
    return fail(IA3_UNSUPPORTED,
                "rows, in, out are %" PRId64 ", %" PRId64 ", %" PRId64
                "; expected at most 2^30, and positive multiples "
                "of 8 for in and out: use another kernel.",
                args.rows, args.in, args.out);
  }
  if (const ia3_status status = check_vector("bias", args.bias, 2)) return status;
  if (const ia3_status status = check_vector("scale", args.scale, sizeof(float))) return status;
  if (const ia3_status status = check_matrix("x", args.x, args.rows, args.in, args.x_stride)) return status;
  if (const ia3_status status = check_matrix("weight", args.weight, args.out, args.in, args.weight_stride)) {
    return status;
  }
  return check_matrix("y", args.y, args.rows, args.out, args.y_stride);
}

ia3_status multiprocessors_of_current_device(int* count) {
  int device = 0, major = 0, minor = 0;
  if (const ia3_status status = checked(cudaGetDevice(&device))) return status;
  const std::pair<cudaDeviceAttr, int*> questions[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                                                       {cudaDevAttrComputeCapabilityMinor, &minor},
                                                       {cudaDevAttrMultiProcessorCount, count}};
  for (const auto& [attribute, answer] : questions) {  // of which the runtime keeps the answers
    if (const ia3_status status = checked(cudaDeviceGetAttribute(answer, attribute, device))) return status;
  }
  if (major == 9 && minor == 0) return IA3_OK;  // sm_90a's machine code runs on nothing else, newer devices included
  return fail(IA3_UNSUPPORTED, "the device's compute capability is %d.%d; expected 9.0: use another kernel.", major,
              minor);
}

ia3_status run(const ia3_hopper_linear_args& args, ia3_stream stream) {
  if (const ia3_status status = check(args)) return status;
  const int64_t rows = args.rows, outputs = args.out;
  if (rows == 0 || outputs == 0) return IA3_OK;
  if (kBuilt == 0)
    return fail(IA3_UNSUPPORTED,
                "this library was built without CUTLASS, which the Hopper matmul needs: use another kernel.");
  int multiprocessors = 0;
  if (const ia3_status status = multiprocessors_of_current_device(&multiprocessors)) return status;
  constexpr std::make_integer_sequence<int, kBuilt> built;
  const Run kernel =
      args.dtype == IA3_BFLOAT16 ? kernel_of<IA3_BFLOAT16>(args.tile, built) : kernel_of<IA3_FLOAT16>(args.tile, built);
  const int swizzle = choose_swizzle(kHopperTiles[args.tile], rows, outputs, multiprocessors);
  return kernel(args, {multiprocessors, swizzle}, stream);
}

template <size_t... kTiles>
const char* const* names_of(std::index_sequence<kTiles...>) {
  static constexpr const char* names[] = {kHopperTiles[kTiles].name..., nullptr};
  return names;
}

}  // namespace
}  // namespace ia3::cuda

const char* const* ia3_cuda_hopper_tiles(void) {
  return ia3::cuda::names_of(std::make_index_sequence<ia3::cuda::kBuilt>());
}

ia3_status ia3_cuda_hopper_linear(const ia3_hopper_linear_args* args, ia3_stream stream) {
  if (args == nullptr) {
    return ia3::cuda::fail(IA3_INVALID, "args is null; expected the address of an ia3_hopper_linear_args.");
  }
  return ia3::cuda::run(*args, stream);
}
