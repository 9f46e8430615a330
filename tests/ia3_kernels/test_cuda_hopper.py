"""What the Hopper matmul does before it launches: its refusals, the kernel of each tile, the order of tiles.

`csrc/cuda/hopper_dispatch.cpp` is compiled here, in a second or two, against a CUDA runtime and kernels that only note
how they were called.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .c_interface import (
    BFLOAT16,
    CUDA_ERROR,
    FLOAT16,
    FLOAT32,
    INVALID,
    OK,
    UNSUPPORTED,
    HopperLinearArgs,
)

ROOT = Path(__file__).resolve().parents[2]
H100, A100, B200, BROKEN = range(4)  # devices of the runtime below

RUNTIME = """
#pragma once
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMultiProcessorCount };
struct Device { int facts[3]; };
inline const Device devices[] = {{{9, 0, 132}}, {{8, 0, 108}}, {{10, 0, 148}}};
extern "C" { inline int current_device = 0; }
inline cudaError_t cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* answer, cudaDeviceAttr attribute, int device) {
  if (device >= 3) return cudaErrorUnknown;
  *answer = devices[device].facts[attribute];
  return cudaSuccess;
}
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
"""

KERNELS = """
#include <cstdarg>
#include <cstdio>
#include "hopper_linear.h"
#include "status.h"
extern "C" {
int last_launch[4];
size_t args_size = sizeof(ia3_hopper_linear_args);
static char sentence[256];
const char* ia3_last_error() { return sentence; }
}
namespace ia3::cuda {
template <int kTile, ia3_dtype kDType>
ia3_status HopperKernel<kTile, kDType>::run(const ia3_hopper_linear_args&, const HopperLaunch& launch, ia3_stream) {
  const int noted[] = {kTile, kDType, launch.multiprocessors, launch.swizzle};
  for (int i = 0; i < 4; ++i) last_launch[i] = noted[i];
  return IA3_OK;
}
ia3_status fail(ia3_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int length = std::vsnprintf(sentence, sizeof(sentence), format, arguments);
  va_end(arguments);
  return length < 256 ? status : IA3_OK;  // a sentence that would be cut off fails its test
}
ia3_status checked(cudaError_t error) {
  return error == cudaSuccess ? IA3_OK : fail(IA3_CUDA_ERROR, "%s", "the runtime said no");
}
}
#include "hopper_dispatch.cpp"
"""


class Hopper:
    """The library under test, with the last launch as (tile, dtype, multiprocessors, swizzle)."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.ia3_last_error.restype = ctypes.c_char_p
        self.library.ia3_cuda_hopper_tiles.restype = ctypes.POINTER(ctypes.c_char_p)
        assert ctypes.c_size_t.in_dll(self.library, "args_size").value == ctypes.sizeof(HopperLinearArgs)
        names = itertools.takewhile(lambda name: name, self.library.ia3_cuda_hopper_tiles())
        self.tiles = [name.decode() for name in names if name]

    def use(self, device: int) -> None:
        ctypes.c_int.in_dll(self.library, "current_device").value = device

    def call(self, args: HopperLinearArgs | None) -> tuple[int, tuple[int, ...] | None]:
        noted = (ctypes.c_int * 4).in_dll(self.library, "last_launch")
        noted[:] = [-1] * 4
        status = self.library.ia3_cuda_hopper_linear(ctypes.byref(args) if args else None, None)
        return status, None if noted[0] < 0 else tuple(noted)

    def sentence(self) -> str:
        return str(self.library.ia3_last_error().decode())

    def launch(self, args: HopperLinearArgs) -> tuple[int, ...]:
        status, noted = self.call(args)
        assert status == OK, self.sentence()
        assert noted is not None
        return noted


def _build(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    (folder / "library.cpp").write_text(KERNELS)
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags]
    command += [f"-I{folder}", f"-I{ROOT / 'csrc' / 'cuda'}", "library.cpp", "-o", "library.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "library.so"


@pytest.fixture(scope="module")
def _library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("hopper"), "-DIA3_HOPPER")


@pytest.fixture
def hopper(_library: Path) -> Hopper:
    hopper = Hopper(_library)
    hopper.use(H100)
    return hopper


def _args(rows: int = 512, out: int = 1024, inputs: int = 3072, **changes: Any) -> HopperLinearArgs:
    """Arguments that the matmul takes, but for `changes`."""
    memory = 1 << 20  # addresses, which nothing here reads
    args = HopperLinearArgs(BFLOAT16, rows, inputs, out, memory, inputs, memory, inputs, memory, memory, memory, out, 0)
    for name, value in changes.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return args


# out, in of the matrices of Llama-3.2-3B and Llama-3.1-8B
MATRICES = [
    *[(1024, 3072), (3072, 3072), (8192, 3072), (3072, 8192)],
    *[(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336)],
]
ROWS = [512, 1024, 2048, 4096, 8192, 16384]


def _extent(name: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)x64 (cooperative|pingpong)", name)
    assert match, name
    return int(match[1]), int(match[2])


def _tiles(name: str, rows: int, out: int, swizzle: int = 1) -> int:
    """How many are computed, with the padding that CUTLASS adds for clusters of two and for the swizzle."""
    tile_rows, tile_out = _extent(name)
    down = math.ceil(rows / tile_rows / 2 / swizzle) * 2 * swizzle
    across = math.ceil(out / tile_out / swizzle) * swizzle
    return down * across


def test_each_tile_and_type_has_its_kernel(hopper: Hopper) -> None:
    for tile, dtype in itertools.product(range(len(hopper.tiles)), (BFLOAT16, FLOAT16)):
        assert hopper.launch(_args(tile=tile, dtype=dtype))[:3] == (tile, dtype, 132)


def test_the_order_of_tiles_costs_next_to_nothing(hopper: Hopper) -> None:
    for tile, name in enumerate(hopper.tiles):
        for rows, (out, inputs) in itertools.product([17, 100, 1000, 16400, *ROWS], MATRICES):
            swizzle = hopper.launch(_args(rows, out, inputs, tile=tile))[3]
            assert swizzle in (1, 2, 4, 8)
            tiles, padded = _tiles(name, rows, out), _tiles(name, rows, out, swizzle)
            assert padded <= 1.07 * tiles, (name, rows, out, swizzle)
            assert math.ceil(padded / 132) == math.ceil(tiles / 132), (name, rows, out, swizzle)


def test_large_shapes_are_ordered_in_squares(hopper: Hopper) -> None:
    assert hopper.launch(_args(16384, 14336, 4096, tile=0))[3] == 8  # 128 x 56 tiles
    assert hopper.launch(_args(2048, 3072, 4096, tile=0))[3] == 4  # 16 x 12; 8 would make it 16 x 16


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"dtype": 7}, INVALID, "dtype is 7"),
        ({"rows": -1}, INVALID, "rows, in, out are -1, 3072, 1024"),
        ({"tile": 99}, INVALID, "tile is 99"),
        ({"tile": -1}, INVALID, "tile is -1"),
        ({"x": None}, INVALID, "x is null"),
        ({"weight": None}, INVALID, "weight is null"),
        ({"y": None}, INVALID, "y is null"),
        ({"x_stride": 3064}, INVALID, "x_stride is 3064"),
        ({"weight_stride": 0}, INVALID, "weight_stride is 0"),
        ({"y_stride": -1024}, INVALID, "y_stride is -1024"),
        ({"bias": 4097}, INVALID, "bias is at 0x1001"),
        ({"scale": 4098}, INVALID, "scale is at 0x1002"),
        ({"dtype": FLOAT32}, UNSUPPORTED, "dtype is fp32"),
        ({"inputs": 0}, UNSUPPORTED, "rows, in, out are 512, 0, 1024"),
        ({"inputs": 3076}, UNSUPPORTED, "rows, in, out are 512, 3076, 1024"),
        ({"out": 1023}, UNSUPPORTED, "rows, in, out are 512, 3072, 1023"),
        ({"rows": 1 << 31}, UNSUPPORTED, "rows, in, out are 2147483648, 3072, 1024"),
        ({"x": 4096 + 8}, UNSUPPORTED, "x is at 0x1008"),
        ({"weight": 4096 + 2}, UNSUPPORTED, "weight is at 0x1002"),
        ({"y": 4096 + 8}, UNSUPPORTED, "y is at 0x1008"),
        ({"x_stride": 3076}, UNSUPPORTED, "x_stride 3076"),
        ({"weight_stride": 3073}, UNSUPPORTED, "weight_stride 3073"),
        ({"y_stride": 1 << 62}, UNSUPPORTED, "y_stride 4611686018427387904"),
        ({"rows": 1, "x_stride": 8}, UNSUPPORTED, "x_stride 8"),
    ],
)
def test_what_it_does_not_take(hopper: Hopper, changes: dict[str, Any], status: int, words: str) -> None:
    args = _args(**changes)
    assert hopper.call(args) == (status, None)
    sentence = hopper.sentence()
    assert words in sentence
    assert "expected" in sentence
    assert sentence.endswith(".")


def test_without_cutlass_there_are_no_tiles(tmp_path: Path) -> None:
    hopper = Hopper(_build(tmp_path))
    assert hopper.tiles == []
    assert hopper.call(_args()) == (UNSUPPORTED, None)
    assert "built without CUTLASS" in hopper.sentence()


def test_no_arguments(hopper: Hopper) -> None:
    assert hopper.call(None) == (INVALID, None)


@pytest.mark.parametrize("shape", [(0, 1024, 3072), (512, 0, 3072), (0, 0, 0)])
def test_nothing_to_write_launches_nothing(hopper: Hopper, shape: tuple[int, int, int]) -> None:
    assert hopper.call(_args(*shape, x=None, weight=None, y=None)) == (OK, None)


@pytest.mark.parametrize(("device", "capability"), [(A100, "8.0"), (B200, "10.0")])
def test_other_devices_are_left_to_other_kernels(hopper: Hopper, device: int, capability: str) -> None:
    hopper.use(device)
    assert hopper.call(_args()) == (UNSUPPORTED, None)
    assert f"compute capability is {capability}" in hopper.sentence()


def test_an_error_of_the_runtime_is_passed_on(hopper: Hopper) -> None:
    hopper.use(BROKEN)
    assert hopper.call(_args()) == (CUDA_ERROR, None)
    assert hopper.sentence() == "the runtime said no"
