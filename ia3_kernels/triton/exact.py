"""Exact merging: scaling in place such that it can be undone bit-exactly; ``docs/exact-merging.md`` has the proof.

===================  ===================================================================  ===========================
kernel               equation                                                             bytes, of N K weights
===================  ===================================================================  ===========================
exact_scale_kernel   merge: w' = round(w l), parity = w & 1                               2 N K b + N K / 8
                     unmerge: n = w' / l towards zero, w = n + ((n ^ parity) & 1)
                     swap: the old l out of the weight, the new one into it
stays_finite_kernel  whether all of round(w l) is finite                                  N K b
===================  ===================================================================  ===========================

A program is one warp: 8 adjacent weights a thread, a unit, of BLOCK_M rows, whose loads are in flight together. So it
takes no barrier to find out whether a unit has escapes; ``exact_gpu`` says what becomes of those that have.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..exact_gpu import CHECK, COLLECT, MOVE, TAKE_BACK, counts_of, total_of
from ..launches import EXACT_COLUMNS, WeightLaunch, exact_launch
from .functions import LANES, round_to

UNIT = EXACT_COLUMNS * LANES
_MOVE: tl.constexpr = tl.constexpr(MOVE)
_COLLECT: tl.constexpr = tl.constexpr(COLLECT)
_TAKE_BACK: tl.constexpr = tl.constexpr(TAKE_BACK)


@triton.jit
def pattern_of(x):
    """Return the bits of 16- or 32-bit numbers as integers."""
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def widen(x):
    """Return 16- or 32-bit numbers in fp32."""
    if x.dtype == tl.bfloat16:  # its bits are the upper half; the interpreter's own conversion has wrong subnormals
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def unscaled(merged, inverse, odd):
    """Return the pattern next to merged ∘ inverse, from zero on, of the parity of ``odd``; and whether that is NaN."""
    DTYPE: tl.constexpr = merged.dtype
    quotient = widen(merged).to(inverse.dtype) * inverse
    if DTYPE == tl.bfloat16:
        low = (quotient.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    else:
        nearest = quotient.to(DTYPE)
        low = pattern_of(nearest)
        low -= (tl.abs(nearest.to(inverse.dtype)) > tl.abs(quotient)).to(low.dtype)  # towards zero
    return low + ((low ^ odd) & 1), quotient != quotient


@triton.jit
def tile_of_unit(cols, rows_per_group, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a program's group of rows, its rows' first and the first after them (int64), unit, and columns [*, 8]."""
    units = tl.cdiv(cols, BLOCK_N)
    program = tl.program_id(0)
    block, unit = program // units, program % units
    blocks_a_group = tl.cdiv(rows_per_group, BLOCK_M)
    group = (block // blocks_a_group).to(tl.int64)
    begin = group * rows_per_group
    first = begin + block % blocks_a_group * BLOCK_M
    eight = tl.arange(0, BLOCK_N // 8)[:, None]
    return group, first, begin + rows_per_group, unit, unit * BLOCK_N + eight * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def exact_scale_kernel(
    weight,  # [rows, cols], columns contiguous
    old_scale,  # [rows] or [groups, cols] fp32, or None: nothing is taken out
    old_inverse,  # 1 / old_scale, for an fp32 weight in fp64
    new_scale,  # likewise; None: nothing is put in
    new_inverse,
    parity,  # [rows, ceil(cols / 8)] uint8
    positions,  # [escapes] int64, ascending: of the old scale's; or None
    bits,  # [escapes], their patterns
    counts,  # [rows, units] int16: how many escapes a unit has, -1 for one that has old ones; or None
    total,  # [1] int64
    offsets,  # [rows, units] int64: how many there are up to a unit's end
    new_positions,  # [all escapes] int64
    new_bits,
    rows_per_group,
    cols,
    weight_stride,
    parity_stride,
    escapes,
    search_step,  # the largest power of two up to `escapes`
    SCALES_ROWS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    DTYPE: tl.constexpr = weight.dtype.element_ty
    group, first, end, unit, col = tile_of_unit(cols, rows_per_group, BLOCK_M, BLOCK_N)
    inside = col < cols
    byte = unit * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)[:, None]
    units = tl.cdiv(cols, BLOCK_N)
    if not SCALES_ROWS:
        at = group * cols + col
        if old_scale is not None:
            r = tl.load(old_inverse + at, mask=inside, other=1.0)
        if new_scale is not None:
            s = tl.load(new_scale + at, mask=inside, other=1.0)
            q = tl.load(new_inverse + at, mask=inside, other=1.0)
    w: tl.tuple = ()
    odd: tl.tuple = ()
    visits: tl.tuple = ()
    for i in tl.static_range(BLOCK_M):
        row = first + i
        visit = row < end
        if MODE != _MOVE:
            found = tl.load(counts + row * units + unit, mask=visit, other=0)
            visit = visit & ((found > 0) == (MODE == _COLLECT))
        visits += (visit,)
        w += (tl.load(weight + row * weight_stride + col, mask=inside & visit, other=0.0),)
        if old_scale is not None:
            odd += (tl.load(parity + row * parity_stride + byte, mask=(byte * 8 < cols) & visit, other=0),)
    for i in tl.static_range(BLOCK_M):
        row = first + i
        # Behind a branch no compiler begins before the last load is on its way.
        if visits[i]:
            place = row * units + unit
            position = row * cols + col
            x = w[i]
            if old_scale is not None:
                if SCALES_ROWS:
                    r = tl.load(old_inverse + row)
                before, _ = unscaled(x, r, (odd[i] >> tl.arange(0, 8)[None, :].to(tl.uint8)).to(pattern_of(x).dtype))
                if positions is not None:  # which compiling decides, and the values below not  # noqa: SIM102
                    if tl.load(counts + place) != 0:
                        # As many old escapes as lie before each position, a bit at a time
                        passed = tl.zeros_like(position)
                        step = tl.zeros((), tl.int64) + search_step
                        while step > 0:
                            known = passed + step <= escapes
                            other = tl.load(positions + passed + step - 1, mask=known, other=0)
                            passed += tl.where(known & (other < position), step, 0)
                            step = step // 2
                        known = inside & (passed < escapes)
                        known = known & (tl.load(positions + passed, mask=known, other=-1) == position)
                        before = tl.where(known, tl.load(bits + passed, mask=known, other=0), before)
                x = before.to(DTYPE, bitcast=True)
            before = pattern_of(x)
            if new_scale is None:
                tl.store(weight + row * weight_stride + col, x, mask=inside)
            else:
                if SCALES_ROWS:
                    s = tl.load(new_scale + row)
                    q = tl.load(new_inverse + row)
                if old_scale is None and MODE == _MOVE:
                    packed = tl.sum((before.to(tl.int32) & 1) << tl.arange(0, 8)[None, :], axis=1, keep_dims=True)
                    tl.store(parity + row * parity_stride + byte, packed.to(tl.uint8), mask=byte * 8 < cols)
                after = round_to(widen(x) * s, DTYPE)
                if MODE == _TAKE_BACK:
                    tl.store(weight + row * weight_stride + col, after, mask=inside)
                else:
                    back, is_nan = unscaled(after, q, before)
                    # The pattern after the largest NaN is that of -0, so no NaN may count as undone; nor may one that
                    # came in, whose pattern after arithmetic differs between processors.
                    wrong = (((back != before) | is_nan) & inside).to(tl.int32)
                    of_eight = tl.sum(wrong, axis=1)
                    count = tl.sum(of_eight, axis=0)
                    if MODE == _COLLECT:
                        at = tl.load(offsets + place) - count + (tl.cumsum(of_eight, axis=0) - of_eight)[:, None]
                        at += tl.cumsum(wrong, axis=1) - wrong
                        tl.store(new_positions + at, position, mask=wrong != 0)
                        tl.store(new_bits + at, before, mask=wrong != 0)
                        tl.store(weight + row * weight_stride + col, after, mask=inside)
                    elif count != 0:
                        tl.store(counts + place, count.to(tl.int16))
                        tl.atomic_add(total, count.to(tl.int64))
                    else:
                        if positions is not None:
                            tl.store(counts + place, 0)
                        tl.store(weight + row * weight_stride + col, after, mask=inside)


@triton.jit
def stays_finite_kernel(
    weight,  # [rows, cols], columns contiguous
    scale,  # [rows] or [groups, cols] fp32
    finite,  # [1] int8: set to 0 where a product is not
    rows_per_group,
    cols,
    weight_stride,
    SCALES_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group, first, end, _, col = tile_of_unit(cols, rows_per_group, BLOCK_M, BLOCK_N)
    inside = col < cols
    if not SCALES_ROWS:
        s = tl.load(scale + group * cols + col, mask=inside, other=1.0)
    w: tl.tuple = ()
    for i in tl.static_range(BLOCK_M):
        row = first + i
        w += (tl.load(weight + row * weight_stride + col, mask=inside & (row < end), other=0.0),)
    unbounded = tl.zeros(col.shape, tl.int32)
    for i in tl.static_range(BLOCK_M):
        row = first + i
        if row < end:
            if SCALES_ROWS:
                s = tl.load(scale + row)
            scaled = tl.abs(widen(round_to(widen(w[i]) * s, weight.dtype.element_ty)))
            unbounded |= (inside & (scaled.to(tl.int32, bitcast=True) >= 0x7F800000)).to(tl.int32)
    if tl.max(tl.max(unbounded, axis=1), axis=0) != 0:
        tl.store(finite, 0)


def exact_scale(
    mode: int,
    weight: Tensor,
    old: Tensor | None,
    new: Tensor | None,
    dim: int,
    parity: Tensor | None = None,
    positions: Tensor | None = None,
    bits: Tensor | None = None,
    workspace: Tensor | None = None,
    offsets: Tensor | None = None,
    new_positions: Tensor | None = None,
    new_bits: Tensor | None = None,
    launch: WeightLaunch | None = None,
) -> None:
    """Launch what ``exact_gpu`` asks for; the first four bytes of a workspace are the answer of a check."""
    if not weight.numel():
        return
    rows, cols = weight.shape
    scale = new if old is None else old
    assert scale is not None
    rows_per_group = rows if dim == 0 else rows // len(scale)
    launch = launch or exact_launch(rows_per_group, LANES)
    units = triton.cdiv(cols, launch.BLOCK_N)
    grid = (rows // rows_per_group * triton.cdiv(rows_per_group, launch.BLOCK_M) * units,)
    constants = {"SCALES_ROWS": dim == 0, "BLOCK_M": launch.BLOCK_M, "BLOCK_N": launch.BLOCK_N}
    if mode == CHECK:
        assert workspace is not None
        finite = workspace.fill_(1).view(torch.int8)
        stays_finite_kernel[grid](
            weight,
            scale.contiguous(),
            finite,
            rows_per_group,
            cols,
            weight.stride(0),
            **constants,
            num_warps=launch.num_warps,
        )
        return
    counts = total = None
    if workspace is not None:
        counts, total = counts_of(workspace), total_of(workspace)
        if mode == MOVE:
            workspace.zero_()
            if positions is not None:
                counts[positions // cols * units + positions % cols // launch.BLOCK_N] = -1
    wide = torch.float64 if weight.dtype == torch.float32 else torch.float32
    factors: list[Tensor | None] = []
    for given in (old, new):
        factors += [None, None] if given is None else [given.contiguous(), 1 / given.to(wide).contiguous()]
    escapes = 0 if positions is None else len(positions)
    assert parity is not None
    exact_scale_kernel[grid](
        *(weight, *factors, parity, positions, bits, counts, total, offsets, new_positions, new_bits),
        *(rows_per_group, cols, weight.stride(0), parity.stride(0), escapes, 1 << max(0, escapes.bit_length() - 1)),
        **constants,
        MODE=mode,
        num_warps=launch.num_warps,
    )
