"""``scale_weight_``: W ← diag(s) W, or W diag(s), in place; moves 2 N K b bytes and the vector, one flop an element."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launches import WeightLaunch, weight_launch
from .functions import LANES, round_to, tile_of_program


@triton.jit
def scale_weight_kernel(
    weight,  # [rows, cols], columns contiguous
    scale,  # [rows] or [cols]
    rows,
    cols,
    weight_stride,
    ALONG_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first, col = tile_of_program(cols, BLOCK_M, BLOCK_N)
    inside = col < cols
    if not ALONG_ROWS:
        s = tl.load(scale + col, mask=inside)
    w: tl.tuple = ()
    scales: tl.tuple = ()
    for i in tl.static_range(BLOCK_M):
        row = first + i
        w += (tl.load(weight + row * weight_stride + col, mask=inside & (row < rows)),)
        scales += (tl.load(scale + row, mask=row < rows) if ALONG_ROWS else s,)
    for i in tl.static_range(BLOCK_M):
        row = first + i
        # Behind a branch no compiler begins before the last load is on its way.
        if row < rows:
            # w ← w s
            scaled = w[i].to(tl.float32) * scales[i].to(tl.float32)
            tl.store(weight + row * weight_stride + col, round_to(scaled, weight.dtype.element_ty), mask=inside)


def scale_weight_(weight: Tensor, scale: Tensor, dim: int, launch: WeightLaunch | None = None) -> None:
    if not weight.numel():
        return
    # A Conv1D's weight comes transposed: its rows are the columns of what lies in memory.
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        weight, dim = weight.t(), 1 - dim
    rows, cols = weight.shape
    if weight.stride(1) != 1 and cols > 1:
        scaled = weight.contiguous()
        scale_weight_(scaled, scale, dim, launch)
        weight.copy_(scaled)
        return
    launch = launch or weight_launch(rows, cols, weight.element_size(), LANES)
    scale_weight_kernel[(triton.cdiv(rows, launch.BLOCK_M) * triton.cdiv(cols, launch.BLOCK_N),)](
        weight,
        scale.contiguous(),
        rows,
        cols,
        weight.stride(0),
        ALONG_ROWS=dim == 0,
        BLOCK_M=launch.BLOCK_M,
        BLOCK_N=launch.BLOCK_N,
        num_warps=launch.num_warps,
    )
