"""How kernels are launched: pure functions of shape, dtype and architecture, in field-standard names.

A launch is a frozen dataclass whose fields are the kernel's constants. Tests pass their own. Where ``ia3 tune`` has
measured this device, :mod:`~ia3_kernels.routes` knows better which of the routes below wins.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

# So many rows are padded to one tile of the tensor cores: the weight is streamed once, and all else is small.
FEW_ROWS = 16
# Columns of a thread that merges exactly: its lowest bits are a byte.
EXACT_COLUMNS = 8


@dataclass(frozen=True)
class ActivationLaunch:
    """A tile of BLOCK_M x BLOCK_N; backward, a program sums CHUNK rows, tile by tile."""

    BLOCK_M: int
    BLOCK_N: int
    CHUNK: int
    num_warps: int


@dataclass(frozen=True)
class WeightLaunch:
    """A tile of BLOCK_M x BLOCK_N."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


@dataclass(frozen=True)
class LinearLaunch:
    """The tiled matmul: a tile of BLOCK_M rows x BLOCK_N outputs, K in steps of BLOCK_K, in SPLIT_K parts.

    GROUP_M: so many rows of tiles are visited together, for the weight's sake in L2. TMA: tensor descriptors (Hopper
    and later) instead of pointers.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int
    GROUP_M: int
    TMA: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Architecture:
    """What a launch depends on: ``cuda`` or ``hip``, the compute capability (90 for Hopper), multiprocessors."""

    backend: str
    capability: int
    multiprocessors: int

    @property
    def lanes(self) -> int:
        """Return the threads of a warp."""
        return 64 if self.backend == "hip" else 32

    @property
    def has_tma(self) -> bool:
        """Return whether tensor descriptors are in hardware."""
        return self.backend == "cuda" and self.capability >= 90

    @property
    def has_warpgroup_matmul(self) -> bool:
        """Return whether matmuls read operands from shared memory, for 64 rows at least: wgmma (Hopper), tcgen05."""
        return self.backend == "cuda" and 90 <= self.capability < 120

    @property
    def shared_memory(self) -> int:
        """Return the bytes of shared memory that a program can have."""
        if self.backend == "hip":
            return 64 << 10
        if self.has_warpgroup_matmul:
            return 227 << 10
        return (163 if self.capability in (80, 87) else 99) << 10


def _power_of_two(n: int, low: int, high: int) -> int:
    """Return the smallest power of two that is at least ``n``, kept within ``low`` and ``high``."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


def _strip(cols: int, element_size: int, lanes: int) -> tuple[int, int]:
    """Return a program's columns and warps: a thread has 16 bytes of a row, and few threads idle at the row's end."""
    vector = 16 // element_size
    strip = _power_of_two(cols, vector, 128 * vector)
    while strip > 64 * vector and -(-cols // strip) * strip > cols + cols // 16:
        strip //= 2
    return strip, max(1, strip // (lanes * vector))


@functools.lru_cache(maxsize=1024)  # every call asks
def activation_launch(
    rows: int, cols: int, element_size: int, is_backward: bool = False, lanes: int = 32
) -> ActivationLaunch:
    """Return a launch with the loads of BLOCK_M rows in flight: four forward, two backward, which reads three tensors.

    lanes: threads of a warp. Where the rows are few, so are those of a program, so that there are enough of them.
    """
    strip, warps = _strip(cols, element_size, lanes)
    if not is_backward:
        block_m = 4 if rows * cols * element_size >= 4 << 20 else 1
        return ActivationLaunch(block_m, strip, block_m, warps)
    # A chunk's partial sums cost 8 bytes a column; 64 rows make that less than 2 % of what a chunk moves.
    chunk = _power_of_two(rows, 1, 64)
    while chunk > 16 and rows * cols * element_size < chunk << 20:
        chunk //= 2
    return ActivationLaunch(min(chunk, 2), strip, chunk, warps)


@functools.lru_cache(maxsize=1024)
def weight_launch(rows: int, cols: int, element_size: int, lanes: int = 32) -> WeightLaunch:
    """Return a launch with the loads of eight rows in flight: the pass has one tensor, read and written."""
    strip, warps = _strip(cols, element_size, lanes)
    return WeightLaunch(_power_of_two(rows, 1, 8), strip, warps)


def exact_launch(rows: int, lanes: int = 32) -> WeightLaunch:
    """Return a launch of one warp, which has eight columns a thread of four rows in flight."""
    return WeightLaunch(_power_of_two(rows, 1, 4), EXACT_COLUMNS * lanes, 1)


def linear_launch(
    rows: int,
    outputs: int,
    inputs: int,
    element_size: int,
    architecture: Architecture,
    is_aligned: bool,
) -> LinearLaunch:
    """Return the tiles for ``[rows, inputs] x [inputs, outputs]``.

    is_aligned: addresses and rows of both are on 16 bytes.

    Up to 16 rows the weight is streamed once and K is split until every multiprocessor has two programs. More rows take
    the largest tile that still fills the device once; what does not fill it splits K.
    """
    if element_size == 4:  # TF32 would not be fp32: full-precision dots have small tiles
        block_m, block_n, block_k, warps, stages = _power_of_two(rows, 16, 64), 64, 32, 8 if rows > 32 else 4, 2
    elif rows <= FEW_ROWS:
        block_m, block_n, block_k, warps, stages = 16, 32, 256 if is_aligned else 64, 4, 3
    elif not is_aligned:  # every element has its own address and mask, in registers
        block_m, block_n, block_k, warps, stages = 64, 64, 32, 8, 2
    elif rows <= 64:
        block_m, block_n, block_k, warps, stages = _power_of_two(rows, 32, 64), 64, 128, 4, 4
        if architecture.has_warpgroup_matmul:
            block_m = 64
    else:
        block_m, block_n, block_k, warps, stages = 128, 128, 64 if architecture.has_tma else 32, 8, 3
        # 256 columns leave no registers for anything but the sums, and half as many tiles.
        if architecture.has_warpgroup_matmul:
            fills_device = -(-rows // 128) * -(-outputs // 256) >= architecture.multiprocessors
            block_n = 256 if fills_device else 128
    use_tma = is_aligned and architecture.has_tma and rows > FEW_ROWS
    if architecture.backend == "hip":
        stages = 2
    # A stage holds both operands; pointers need one buffer less than stages.
    stage = (block_m + block_n) * block_k * element_size
    stages = min(stages, architecture.shared_memory // stage + (0 if use_tma else 1))
    tiles = -(-rows // block_m) * -(-outputs // block_n)
    steps = -(-inputs // block_k)
    wanted = 2 * architecture.multiprocessors if rows <= FEW_ROWS else architecture.multiprocessors
    # Every part is at least three steps long, or the pipeline never fills. A power of two: each value is a program to
    # compile, and the number of rows changes from step to step.
    split_k = 1 << max(1, min(wanted // tiles, steps // 3, 16)).bit_length() - 1
    return LinearLaunch(block_m, block_n, block_k, split_k, 8, use_tma, warps, stages)
