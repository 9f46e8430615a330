// y = (x W^T + b) s on Hopper: CUTLASS' main loop (TMA loads, warp-specialized wgmma) under this file's epilogue, which
// works on the fp32 sums and rounds once. Compiled once per tile (see CMakeLists.txt): IA3_TILE is its place in
// hopper_linear.h. Bytes: 2 (rows in + out in + rows out) + 6 out.
#include <atomic>
#include <type_traits>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "hopper_linear.h"
#include "status.h"

#if !defined(CUTLASS_ARCH_MMA_SM90_SUPPORTED)
#error "the Hopper matmul needs CUDA 12 or newer"
#endif
static_assert(IA3_TILE >= 0 && IA3_TILE < ia3::cuda::kHopperTileCount, "hopper_linear.h has no such tile");

namespace ia3::cuda {
namespace {

using cute::_0;
using cute::_1;
using cute::Int;
using cute::Shape;
using cute::Stride;

template <ia3_dtype kDType>
using Element = std::conditional_t<kDType == IA3_BFLOAT16, cutlass::bfloat16_t, cutlass::half_t>;

template <Schedule kSchedule>
struct Schedules {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
template <>
struct Schedules<Schedule::kPingpong> {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// The types that CUTLASS builds for one tile. To it, x is A, the weight is B and y is D.
template <int kTile, typename T>
struct Matmul {
  static constexpr HopperTile kShape = kHopperTiles[kTile];
  using Tile = Shape<Int<kShape.rows>, Int<kShape.outputs>, Int<kHopperStep>>;
  using Cluster = Shape<Int<kHopperCluster>, _1, _1>;
  using Types = Schedules<kShape.schedule>;
  static constexpr int kAlignment = 16 / sizeof(T);

  // y = (sum + bias) scale; a null bias reads as zeros, a null scale as ones
  template <template <class> class Function, typename Result>
  using Compute =
      cutlass::epilogue::fusion::Sm90Compute<Function, Result, float, cutlass::FloatRoundStyle::round_to_nearest>;
  template <typename Value>
  using Row = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Value, float, Stride<_0, _1, _0>>;
  using Biased = cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::plus, float>,
                                                    cutlass::epilogue::fusion::Sm90AccFetch, Row<T>>;
  using Scaled = cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::multiplies, T>, Biased, Row<float>>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor, kAlignment, T,
      cutlass::layout::RowMajor, kAlignment, typename Types::Epilogue, Scaled>::CollectiveOp;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, cutlass::layout::RowMajor, kAlignment, T,
      cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      typename Types::Mainloop>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;

  static typename Kernel::Arguments arguments(const ia3_hopper_linear_args& args, const HopperLaunch& launch) {
    typename Kernel::Arguments result;
    result.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    result.problem_shape = {int(args.rows), int(args.out), int(args.in), 1};
    result.mainloop.ptr_A = static_cast<const T*>(args.x);
    result.mainloop.dA = {args.x_stride, _1{}, 0};
    result.mainloop.ptr_B = static_cast<const T*>(args.weight);
    result.mainloop.dB = {args.weight_stride, _1{}, 0};
    result.epilogue.thread = {{{}, {static_cast<const T*>(args.bias), T(0)}, {}}, {args.scale, 1.0f}, {}};
    result.epilogue.ptr_D = static_cast<T*>(args.y);
    result.epilogue.dD = {args.y_stride, _1{}, 0};
    result.hw_info.sm_count = launch.multiprocessors;
    result.scheduler.max_swizzle_size = launch.swizzle;
    return result;
  }
};

// Lets the kernel have its shared memory, which the runtime asks for once per device.
template <typename Kernel>
cudaError_t prepare() {
  static std::atomic<uint64_t> prepared{0};  // a bit per device
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (prepared.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      cutlass::device_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
  if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

}  // namespace

// Launched by hand: CUTLASS' own launcher sets the kernel's attributes at each call, and clears the runtime's error.
template <int kTile, ia3_dtype kDType>
ia3_status HopperKernel<kTile, kDType>::run(const ia3_hopper_linear_args& args, const HopperLaunch& launch,
                                            ia3_stream stream) {
  using Traits = Matmul<kTile, Element<kDType>>;
  using Kernel = typename Traits::Kernel;
  if (const cudaError_t error = prepare<Kernel>(); error != cudaSuccess) return checked(error);

  const typename Kernel::Arguments arguments = Traits::arguments(args, launch);
  if (Kernel::get_workspace_size(arguments) != 0) {  // a scheduler or an epilogue of another CUTLASS
    return fail(IA3_UNSUPPORTED, "this CUTLASS wants a workspace, expected none: use another kernel.");
  }
  typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kHopperCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* parameters[] = {&params};
  return checked(
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>), parameters));
}

template struct HopperKernel<IA3_TILE, IA3_BFLOAT16>;
template struct HopperKernel<IA3_TILE, IA3_FLOAT16>;

}  // namespace ia3::cuda
