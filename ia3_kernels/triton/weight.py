"""``scale_weight_``: W ← diag(s) W, or W diag(s), in place; moves 2 N K b bytes and the vector, one flop an element."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launches import weight_launch
from .functions import round_to


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
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (col < cols)
    if ALONG_ROWS:
        s = tl.load(scale + row, mask=row < rows, other=0.0)
    else:
        s = tl.load(scale + col, mask=col < cols, other=0.0)
    place = weight + row * weight_stride + col
    # w ← w s
    w = tl.load(place, mask=mask, other=0.0).to(tl.float32) * s.to(tl.float32)
    tl.store(place, round_to(w, weight.dtype.element_ty), mask=mask)


def scale_weight_(weight: Tensor, scale: Tensor, dim: int) -> None:
    if not weight.numel():
        return
    # A Conv1D's weight comes transposed: its rows are the columns of what lies in memory.
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        weight, dim = weight.t(), 1 - dim
    rows, cols = weight.shape
    if weight.stride(1) != 1 and cols > 1:
        scaled = weight.contiguous()
        scale_weight_(scaled, scale, dim)
        weight.copy_(scaled)
        return
    launch = weight_launch(rows, cols, weight.element_size())
    grid = (triton.cdiv(rows, launch.BLOCK_M), triton.cdiv(cols, launch.BLOCK_N))
    scale_weight_kernel[grid](
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
