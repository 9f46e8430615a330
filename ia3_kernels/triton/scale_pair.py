"""``scale_pair`` and its backward pass: one input on its way into two layers, memory-bound, one pass each.

``T`` rows, ``K`` columns, ``b`` bytes an element. A thread stays in 16 bytes of columns, for which it reads the scales
once, and has the loads of BLOCK_M rows in flight together.

========================  ===========================================  =================  =============
kernel                    equation                                     bytes moved        flops
========================  ===========================================  =================  =============
scale_pair_fwd_kernel     a = x ∘ s_a, b = x ∘ s_b                     3 T K b            2 T K
scale_pair_bwd_kernel     dx = da ∘ s_a + db ∘ s_b                     4 T K b            7 T K
                          partial ds_a = Σ of a chunk: da ∘ x          + 8 K per chunk
                          partial ds_b = Σ of a chunk: db ∘ x
reduce_pair_kernel        ds_a, ds_b = Σ over the chunks               8 K per chunk      2 K per chunk
========================  ===========================================  =================  =============

The sums over rows have two stages and no atomics: chunks of rows, then chunks in their order, so the same inputs give
the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launches import ActivationLaunch, activation_launch
from .activation import as_rows
from .functions import LANES, add_to_sum, round_to, sum_chunks, tile_of_program


@triton.jit
def scale_pair_fwd_kernel(
    x,  # [rows, cols], columns contiguous
    first,  # [cols]
    second,  # [cols]
    a,  # [rows, cols], contiguous
    b,
    rows,
    cols,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    begin, col = tile_of_program(cols, BLOCK_M, BLOCK_N)
    inside = col < cols
    s_a = tl.load(first + col, mask=inside)
    s_b = tl.load(second + col, mask=inside)
    values: tl.tuple = ()
    for i in tl.static_range(BLOCK_M):
        values += (tl.load(x + (begin + i) * x_stride + col, mask=inside & (begin + i < rows)),)
    for i in tl.static_range(BLOCK_M):
        # Behind a branch no compiler begins before the last load is on its way.
        if begin + i < rows:
            place = (begin + i) * cols + col
            # a = x ∘ s_a ; b = x ∘ s_b
            value = values[i].to(tl.float32)
            tl.store(a + place, round_to(value * s_a.to(tl.float32), a.dtype.element_ty), mask=inside)
            tl.store(b + place, round_to(value * s_b.to(tl.float32), b.dtype.element_ty), mask=inside)


@triton.jit
def scale_pair_bwd_kernel(
    grad_first,  # [rows, cols], columns contiguous; or None, where no result needs it
    grad_second,  # the same
    x,  # the same
    first,  # [cols]
    second,  # [cols]
    grad_x,  # [rows, cols], contiguous, or None
    partials_first,  # [chunks, cols] fp32, or None
    partials_second,  # the same
    rows,
    cols,
    grad_first_stride,
    grad_second_stride,
    x_stride,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    DTYPE: tl.constexpr = grad_first.dtype.element_ty if x is None else x.dtype.element_ty
    begin, col = tile_of_program(cols, CHUNK, BLOCK_N)
    end = tl.minimum(begin + CHUNK, rows)
    inside = col < cols
    if grad_x is not None:
        s_a = tl.load(first + col, mask=inside).to(tl.float32)
        s_b = tl.load(second + col, mask=inside).to(tl.float32)
    ds_a, lost_a = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    ds_b, lost_b = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, CHUNK, BLOCK_M):
        das: tl.tuple = ()
        dbs: tl.tuple = ()
        values: tl.tuple = ()
        for i in tl.static_range(BLOCK_M):
            row = begin + start + i
            mask = inside & (row < end)
            if grad_first is not None:
                das += (tl.load(grad_first + row * grad_first_stride + col, mask=mask),)
            if grad_second is not None:
                dbs += (tl.load(grad_second + row * grad_second_stride + col, mask=mask),)
            if x is not None:
                values += (tl.load(x + row * x_stride + col, mask=mask),)
        for i in tl.static_range(BLOCK_M):
            row = begin + start + i
            # All loads are on their way before this branch. A loop that ended at `end` would do without the branch.
            if row < end:
                # dx = da ∘ s_a + db ∘ s_b ; ds_a = Σ da ∘ x ; ds_b = Σ db ∘ x
                if grad_x is not None:
                    dx = das[i].to(tl.float32) * s_a + dbs[i].to(tl.float32) * s_b
                    tl.store(grad_x + row * cols + col, round_to(dx, grad_x.dtype.element_ty), mask=inside)
                if partials_first is not None:
                    term = das[i].to(tl.float32) * values[i].to(tl.float32)
                    ds_a, lost_a = add_to_sum(ds_a, lost_a, term, DTYPE)
                if partials_second is not None:
                    term = dbs[i].to(tl.float32) * values[i].to(tl.float32)
                    ds_b, lost_b = add_to_sum(ds_b, lost_b, term, DTYPE)
    chunk = begin // CHUNK
    if partials_first is not None:
        tl.store(partials_first + chunk * cols + col, ds_a - lost_a, mask=inside)
    if partials_second is not None:
        tl.store(partials_second + chunk * cols + col, ds_b - lost_b, mask=inside)


@triton.jit
def reduce_pair_kernel(
    partials,  # [1 or 2, chunks, cols] fp32
    first,  # [cols]
    second,  # [cols]; the same as first, where there is one
    chunks,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    which = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    # ds = Σ partials, in the order of the chunks
    ds = sum_chunks(partials + which.to(tl.int64) * chunks * cols, 0, chunks, cols, col, BLOCK_M, BLOCK_N)
    if which == 0:
        tl.store(first + col, round_to(ds, first.dtype.element_ty), mask=col < cols)
    else:
        tl.store(second + col, round_to(ds, second.dtype.element_ty), mask=col < cols)


# --- host ----------------------------------------------------------------------------------------------------------


def forward(x: Tensor, first: Tensor, second: Tensor, launch: ActivationLaunch | None = None) -> tuple[Tensor, Tensor]:
    """Compute x ∘ first and x ∘ second."""
    a, b = x.new_empty(x.shape), x.new_empty(x.shape)
    if not x.numel():
        return a, b
    given = as_rows(x)
    rows, cols = given.shape
    launch = launch or activation_launch(rows, cols, x.element_size(), lanes=LANES)
    scale_pair_fwd_kernel[(triton.cdiv(rows, launch.BLOCK_M) * triton.cdiv(cols, launch.BLOCK_N),)](
        given,
        first.contiguous(),
        second.contiguous(),
        a,
        b,
        rows,
        cols,
        given.stride(0),
        BLOCK_M=launch.BLOCK_M,
        BLOCK_N=launch.BLOCK_N,
        num_warps=launch.num_warps,
    )
    return a, b


def backward(
    grad_first: Tensor,
    grad_second: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    wants: Sequence[bool],
    launch: ActivationLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, first and second; an empty tensor for one that is not wanted."""
    wants_x, wants_first, wants_second = wants
    grad_x = x.new_empty(x.shape if wants_x else 0)
    sums = first.new_zeros(first.shape if wants_first else 0), second.new_zeros(second.shape if wants_second else 0)
    if not x.numel() or not any(wants):
        return grad_x, *sums
    da = as_rows(grad_first) if wants_x or wants_first else None
    db = as_rows(grad_second) if wants_x or wants_second else None
    given = as_rows(x)
    rows, cols = given.shape
    launch = launch or activation_launch(rows, cols, x.element_size(), True, LANES)
    chunks = triton.cdiv(rows, launch.CHUNK)
    wanted = [ds for ds in sums if ds.numel()]
    partials = torch.empty(len(wanted), chunks, cols, dtype=torch.float32, device=x.device)
    scale_pair_bwd_kernel[(chunks * triton.cdiv(cols, launch.BLOCK_N),)](
        da,
        db,
        given if wanted else None,
        first.contiguous(),
        second.contiguous(),
        grad_x if wants_x else None,
        partials[0] if wants_first else None,
        partials[-1] if wants_second else None,
        rows,
        cols,
        0 if da is None else da.stride(0),
        0 if db is None else db.stride(0),
        given.stride(0),
        CHUNK=launch.CHUNK,
        BLOCK_M=launch.BLOCK_M,
        BLOCK_N=launch.BLOCK_N,
        num_warps=launch.num_warps,
    )
    if wanted:
        reduce_pair_kernel[(len(wanted), triton.cdiv(cols, 128))](
            partials, wanted[0], wanted[-1], chunks, cols, BLOCK_M=32, BLOCK_N=128, num_warps=4
        )
    return grad_x, *sums
