"""``gated_activation``, ``scaled_activation`` and their backward passes: memory-bound, one pass each.

``T`` rows, ``I`` columns, ``b`` bytes an element. A thread stays in 16 bytes of columns, for which it reads the scale
once, and has the loads of BLOCK_M rows in flight together.

========================  ==========================================  ==================  =====================
kernel                    equation                                    bytes moved         flops
========================  ==========================================  ==================  =====================
activation_fwd_kernel     h = act(g) ∘ u ∘ s                          3 T I b (2 ungated)  about 8 T I (silu)
activation_bwd_kernel     dg = dh ∘ s ∘ u ∘ act'(g)                   5 T I b (3 ungated)  about 16 T I
                          du = dh ∘ s ∘ act(g)
                          partial ds = Σ of a chunk: dh ∘ act(g) ∘ u  + 4 I per chunk
reduce_partials_kernel    ds = Σ over an adapter's chunks             4 I per chunk        I per chunk
========================  ==========================================  ==================  =====================

The sum over rows has two stages and no atomics: chunks of rows, then chunks in their order, so the same inputs give the
same bits. With adapters in the batch, rows are visited sorted by adapter, and a chunk never spans two of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunks import chunks_by_adapter
from ..launches import ActivationLaunch, activation_launch
from .functions import LANES, activate, add_to_sum, load_scale, round_to, sum_chunks, tile_of_program


@triton.jit
def activation_fwd_kernel(
    gate,  # [rows, cols], columns contiguous
    up,  # the same, or None
    scale,  # [cols], or [adapters, cols] with an index, or None
    index,  # [rows] int32, or None
    out,  # [rows, cols]
    rows,
    cols,
    adapters,
    gate_stride,
    up_stride,
    out_stride,
    scale_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    DTYPE: tl.constexpr = out.dtype.element_ty
    first, col = tile_of_program(cols, BLOCK_M, BLOCK_N)
    inside = col < cols
    if scale is not None and index is None:
        s = tl.load(scale + col, mask=inside)
    g: tl.tuple = ()
    u: tl.tuple = ()
    scales: tl.tuple = ()
    for i in tl.static_range(BLOCK_M):
        row = first + i
        mask = inside & (row < rows)
        g += (tl.load(gate + row * gate_stride + col, mask=mask),)
        if up is not None:
            u += (tl.load(up + row * up_stride + col, mask=mask),)
        if index is not None:
            adapter = tl.load(index + row, mask=row < rows, other=-1)
            scales += (load_scale(scale, adapter, adapters, scale_stride, col, mask),)
    for i in tl.static_range(BLOCK_M):
        # Behind a branch no compiler begins before the last load is on its way.
        if first + i < rows:
            # h = act(g) ∘ u ∘ s
            h, _ = activate(g[i].to(tl.float32), ACTIVATION, DTYPE)
            if up is not None:
                h *= u[i].to(tl.float32)
            if index is not None:
                h *= scales[i]
            elif scale is not None:
                h *= s.to(tl.float32)
            tl.store(out + (first + i) * out_stride + col, round_to(h, DTYPE), mask=inside)


@triton.jit
def activation_bwd_kernel(
    grad,  # [rows, cols]
    gate,
    up,  # or None
    scale,  # or None
    order,  # [rows] int64: rows sorted by adapter, or None
    chunk_first,  # [chunks] int32: the chunk's rows are order[first : last]
    chunk_last,
    chunk_adapter,  # [chunks] int32, -1 for none
    grad_gate,  # or None
    grad_up,  # or None
    partials,  # [chunks, cols] fp32, or None
    rows,
    cols,
    adapters,
    grad_stride,
    gate_stride,
    up_stride,
    grad_gate_stride,
    grad_up_stride,
    scale_stride,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    DTYPE: tl.constexpr = gate.dtype.element_ty
    first, col = tile_of_program(cols, CHUNK, BLOCK_N)
    chunk = first // CHUNK
    last = tl.minimum(first + CHUNK, rows)
    inside = col < cols
    if order is not None:
        first = tl.load(chunk_first + chunk).to(tl.int64)
        last = tl.load(chunk_last + chunk).to(tl.int64)
    s = tl.full([BLOCK_N], 1.0, tl.float32)
    if scale is not None:
        if order is not None:
            s = load_scale(scale, tl.load(chunk_adapter + chunk), adapters, scale_stride, col, inside)
        else:
            s = tl.load(scale + col, mask=inside).to(tl.float32)
    ds, lost = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, CHUNK, BLOCK_M):
        row: tl.tuple = ()
        dh: tl.tuple = ()
        g: tl.tuple = ()
        u: tl.tuple = ()
        for i in tl.static_range(BLOCK_M):
            position = first + start + i
            mask = inside & (position < last)
            if order is not None:
                position = tl.load(order + position, mask=position < last, other=0)
            row += (position,)
            dh += (tl.load(grad + position * grad_stride + col, mask=mask),)
            g += (tl.load(gate + position * gate_stride + col, mask=mask),)
            if up is not None:
                u += (tl.load(up + position * up_stride + col, mask=mask),)
        for i in tl.static_range(BLOCK_M):
            # All loads are on their way before this branch. A loop that ended at `last` would do without the branch.
            if first + start + i < last:
                # dg = dh ∘ s ∘ u ∘ act'(g) ; du = dh ∘ s ∘ act(g) ; ds = Σ dh ∘ act(g) ∘ u
                a, da = activate(g[i].to(tl.float32), ACTIVATION, DTYPE)
                dhs = dh[i].to(tl.float32) * s
                if grad_up is not None:
                    tl.store(grad_up + row[i] * grad_up_stride + col, round_to(dhs * a, DTYPE), mask=inside)
                if up is not None:
                    dhs *= u[i].to(tl.float32)
                    a *= u[i].to(tl.float32)
                if grad_gate is not None:
                    tl.store(grad_gate + row[i] * grad_gate_stride + col, round_to(dhs * da, DTYPE), mask=inside)
                ds, lost = add_to_sum(ds, lost, dh[i].to(tl.float32) * a, DTYPE)
    if partials is not None:
        tl.store(partials + chunk * cols + col, ds - lost, mask=inside)


@triton.jit
def reduce_partials_kernel(
    partials,  # [chunks, cols] fp32
    adapter_first,  # [adapters] int32: the adapter's chunks are first .. last, or None
    adapter_last,
    out,  # [adapters, cols]
    chunks,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    adapter = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    first = 0
    last = chunks
    if adapter_first is not None:
        first = tl.load(adapter_first + adapter)
        last = tl.load(adapter_last + adapter)
    # ds = Σ partials, in the order of the chunks
    ds = sum_chunks(partials, first, last, cols, col, BLOCK_M, BLOCK_N)
    tl.store(out + adapter * cols + col, round_to(ds, out.dtype.element_ty), mask=col < cols)


# --- host ----------------------------------------------------------------------------------------------------------


def as_rows(x: Tensor) -> Tensor:
    """Return ``x`` as ``[rows, cols]`` with contiguous columns; a view where its strides allow one."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def flat_index(adapter_index: Tensor | None) -> Tensor | None:
    """Return the index of the rows of :func:`as_rows`."""
    return None if adapter_index is None else adapter_index.reshape(-1).contiguous()


def forward(
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor | None = None,
    activation: str = "silu",
    adapter_index: Tensor | None = None,
    out: Tensor | None = None,
    launch: ActivationLaunch | None = None,
) -> Tensor:
    """Compute act(gate) ∘ up ∘ scale, with or without ``up``; into ``out`` where given, which may be ``gate``."""
    out = gate.new_empty(gate.shape) if out is None else out
    if not out.numel():
        return out
    x, u, h = as_rows(gate), None if up is None else as_rows(up), as_rows(out)
    scale = None if scale is None else scale.contiguous()
    index = flat_index(adapter_index)
    rows, cols = x.shape
    launch = launch or activation_launch(rows, cols, x.element_size(), lanes=LANES)
    activation_fwd_kernel[(triton.cdiv(rows, launch.BLOCK_M) * triton.cdiv(cols, launch.BLOCK_N),)](
        x,
        u,
        scale,
        index,
        h,
        rows,
        cols,
        1 if scale is None or index is None else scale.shape[0],
        x.stride(0),
        0 if u is None else u.stride(0),
        h.stride(0),
        cols,
        ACTIVATION=activation,
        BLOCK_M=launch.BLOCK_M,
        BLOCK_N=launch.BLOCK_N,
        num_warps=launch.num_warps,
    )
    return out


def backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    activation: str,
    adapter_index: Tensor | None,
    wants: Sequence[bool],
    launch: ActivationLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of gate, up and scale; an empty tensor for one that is not wanted."""
    wants_gate, wants_up, wants_scale = wants
    nothing = gate.new_empty(0)
    grad_gate = gate.new_empty(gate.shape) if wants_gate else nothing
    grad_up = gate.new_empty(gate.shape) if wants_up else nothing
    grad_scale = nothing if scale is None else scale.new_zeros(scale.shape if wants_scale else 0)
    wants_scale = grad_scale.numel() > 0
    if not gate.numel():
        return grad_gate, grad_up, grad_scale
    dh, x, u = as_rows(grad), as_rows(gate), None if up is None else as_rows(up)
    rows, cols = x.shape
    launch = launch or activation_launch(rows, cols, x.element_size(), True, LANES)
    scale = None if scale is None else scale.contiguous()
    index = flat_index(adapter_index)
    adapters = 1 if scale is None or index is None else scale.shape[0]
    chunked = None if index is None else chunks_by_adapter(index, adapters, launch.CHUNK)
    chunks = triton.cdiv(rows, launch.CHUNK) if chunked is None else chunked.first.numel()
    partials = torch.empty(chunks, cols, dtype=torch.float32, device=x.device) if wants_scale else None
    order, first, last, adapter = chunked[:4] if chunked is not None else (None,) * 4
    activation_bwd_kernel[(chunks * triton.cdiv(cols, launch.BLOCK_N),)](
        dh,
        x,
        u,
        scale,
        order,
        first,
        last,
        adapter,
        as_rows(grad_gate) if wants_gate else None,
        as_rows(grad_up) if wants_up else None,
        partials,
        rows,
        cols,
        adapters,
        dh.stride(0),
        x.stride(0),
        0 if u is None else u.stride(0),
        cols,
        cols,
        cols,
        ACTIVATION=activation,
        CHUNK=launch.CHUNK,
        BLOCK_M=launch.BLOCK_M,
        BLOCK_N=launch.BLOCK_N,
        num_warps=launch.num_warps,
    )
    if partials is not None:
        reduce_partials_kernel[(adapters, triton.cdiv(cols, 128))](
            partials,
            None if chunked is None else chunked.adapter_first,
            None if chunked is None else chunked.adapter_last,
            grad_scale,
            chunks,
            cols,
            BLOCK_M=32,
            BLOCK_N=128,
            num_warps=4,
        )
    return grad_gate, grad_up, grad_scale
