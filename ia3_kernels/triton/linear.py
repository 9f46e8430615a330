"""``scaled_linear``, y = ((x ∘ s_in) Wᵀ + b) ∘ s_out: ``T`` rows, ``K`` inputs, ``N`` outputs, ``b`` bytes an element.

===================  ==============================================  =======================================  =========
kernel               equation                                        bytes moved, at least                    flops
===================  ==============================================  =======================================  =========
linear_fwd_kernel    the whole, one rounding                         (T K + N K + T N) b + 4 (K + N)          2 T N K
                     with SPLIT_K = S: partial sums over parts of K  (T K + N K) b + 4 S T N
combine_fwd_kernel   y = (Σ partial sums + b) ∘ s_out                4 S T N + T N b                          S T N
===================  ==============================================  =======================================  =========

One kernel serves training and decoding; what differs is the tile. Up to 16 rows it is memory-bound: the weight is read
once, and K is split so that all multiprocessors take part. Its programs are persistent: each walks over tiles, in an
order that keeps a group of rows of tiles and the weights they share in L2. On Hopper and later, operands come through
tensor descriptors (TMA). Scales and bias meet the fp32 sums.

The scaled input is rounded to the input's dtype before the product, as the tensor cores want it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launches import Architecture, LinearLaunch, linear_launch
from .activation import as_rows, flat_index
from .functions import INTERPRETED, load_scale, round_to


@triton.jit
def _place_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the row and column of the ``tile``-th tile, going down GROUP_M tiles before going right."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def _finish(acc, row, col, bias, output_scale, index, rows, outputs, adapters):
    """Compute (acc + b) ∘ s_out in fp32; row ``[M, 1]``, col ``[1, N]``."""
    if bias is not None:
        acc += tl.load(bias + col, mask=col < outputs, other=0.0).to(tl.float32)
    if output_scale is not None:
        if index is not None:
            adapter = tl.load(index + row, mask=row < rows, other=-1)
            acc *= load_scale(output_scale, adapter, adapters, outputs, col, (row < rows) & (col < outputs))
        else:
            acc *= tl.load(output_scale + col, mask=col < outputs, other=0.0).to(tl.float32)
    return acc


@triton.jit
def linear_fwd_kernel(
    x,  # [rows, inputs], inputs contiguous; a descriptor of [BLOCK_M, BLOCK_K] with TMA
    weight,  # [outputs, inputs]; a descriptor of [BLOCK_N, BLOCK_K], or of [BLOCK_K, BLOCK_N] if TRANSPOSED
    bias,  # [outputs] or None
    input_scale,  # [inputs], [adapters, inputs] or None
    output_scale,
    index,  # [rows] int32 or None
    out,  # [rows, outputs], or [SPLIT_K, rows, outputs] fp32
    rows,
    outputs,
    inputs,
    adapters,
    x_stride,
    weight_stride_n,
    weight_stride_k,
    TRANSPOSED: tl.constexpr,  # the weight lies in memory as [inputs, outputs]
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,  # fp32 operands: exactly for fp32 inputs, and for the interpreter, whose 16-bit dot is wrong
):
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    tiles = tiles_m * tiles_n
    steps = tl.cdiv(tl.cdiv(inputs, BLOCK_K), SPLIT_K)
    for job in tl.range(tl.program_id(0), tiles * SPLIT_K, tl.num_programs(0)):
        part = job // tiles
        tile_m, tile_n = _place_of(job % tiles, tiles_m, tiles_n, GROUP_M)
        row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in tl.range(part * steps, (part + 1) * steps):
            first = step * BLOCK_K
            k = first + tl.arange(0, BLOCK_K)
            if TMA:
                a = x.load([tile_m * BLOCK_M, first])
                if TRANSPOSED:
                    w = weight.load([first, tile_n * BLOCK_N])
                else:
                    w = weight.load([tile_n * BLOCK_N, first]).T
            else:
                a = tl.load(x + row * x_stride + k[None, :], mask=(row < rows) & (k[None, :] < inputs), other=0.0)
                w = tl.load(
                    weight + col * weight_stride_n + k[:, None].to(tl.int64) * weight_stride_k,
                    mask=(col < outputs) & (k[:, None] < inputs),
                    other=0.0,
                )
            if input_scale is not None:
                # x ∘ s_in
                if index is not None:
                    adapter = tl.load(index + row, mask=row < rows, other=-1)
                    known = (row < rows) & (k[None, :] < inputs)
                    s = load_scale(input_scale, adapter, adapters, inputs, k[None, :], known)
                else:
                    s = tl.load(input_scale + k[None, :], mask=k[None, :] < inputs, other=0.0).to(tl.float32)
                a = round_to(a.to(tl.float32) * s, a.dtype)
            if WIDEN:
                acc = tl.dot(a.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(a, w, acc)
        mask = (row < rows) & (col < outputs)
        if SPLIT_K == 1:
            acc = _finish(acc, row, col, bias, output_scale, index, rows, outputs, adapters)
            tl.store(out + row * outputs + col, round_to(acc, out.dtype.element_ty), mask=mask)
        else:
            part_row = row + part.to(tl.int64) * rows
            tl.store(out + part_row * outputs + col, acc, mask=mask)


@triton.jit
def combine_fwd_kernel(
    partials,  # [SPLIT_K, rows, outputs] fp32
    bias,
    output_scale,
    index,
    out,  # [rows, outputs]
    rows,
    outputs,
    adapters,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (col < outputs)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    place = row * outputs + col
    for _ in range(SPLIT_K):  # in order, so the same bits every time
        acc += tl.load(partials + place, mask=mask, other=0.0)
        place += tl.cast(rows, tl.int64) * outputs  # a dimension of 1 comes as a constant, which has no .to
    # y = (Σ partial sums + b) ∘ s_out
    acc = _finish(acc, row, col, bias, output_scale, index, rows, outputs, adapters)
    tl.store(out + row * outputs + col, round_to(acc, out.dtype.element_ty), mask=mask)


# --- host ----------------------------------------------------------------------------------------------------------


def _is_aligned(*matrices: Tensor) -> bool:
    """Return whether addresses and rows are on 16 bytes, as 16-byte loads and TMA need."""
    return all(
        matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.stride(1) == 1
        for matrix in matrices
    )


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
    *,
    architecture: Architecture,
    launch: LinearLaunch | None = None,
) -> Tensor:
    """Run ``scaled_linear`` with the product in Triton; checked arguments, x ``[*, K]`` → ``[*, N]``."""
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if not out.numel():
        return out
    rows_of_x = as_rows(x)
    rows, inputs = rows_of_x.shape
    outputs = weight.shape[0]
    if weight.stride(0) != 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    is_transposed = weight.stride(1) != 1
    stored = weight.t() if is_transposed else weight
    is_aligned = _is_aligned(rows_of_x, stored)
    if launch is None:
        launch = linear_launch(rows, outputs, inputs, x.element_size(), architecture, is_aligned)
    if launch.TMA and not is_aligned:  # measured for this shape, elsewhere in memory
        launch = replace(launch, TMA=False)
    index = flat_index(adapter_index)
    scales = [None if scale is None else scale.contiguous() for scale in (input_scale, output_scale)]
    adapters = 1 if index is None else min(scale.shape[0] for scale in scales if scale is not None)
    a: Any = rows_of_x
    w: Any = weight
    if launch.TMA:
        a = TensorDescriptor.from_tensor(rows_of_x, [launch.BLOCK_M, launch.BLOCK_K])
        block = [launch.BLOCK_K, launch.BLOCK_N] if is_transposed else [launch.BLOCK_N, launch.BLOCK_K]
        w = TensorDescriptor.from_tensor(stored, block)
    is_split = launch.SPLIT_K > 1
    target = out
    if is_split:
        target = torch.empty(launch.SPLIT_K, rows, outputs, dtype=torch.float32, device=x.device)
    jobs = triton.cdiv(rows, launch.BLOCK_M) * triton.cdiv(outputs, launch.BLOCK_N) * launch.SPLIT_K
    # Small tiles share a multiprocessor; a large one has it for itself.
    programs = architecture.multiprocessors * (1 if launch.BLOCK_M * launch.BLOCK_N >= 128 * 128 else 4)
    linear_fwd_kernel[(min(jobs, programs),)](
        a,
        w,
        bias,
        scales[0],
        scales[1],
        index,
        target,
        rows,
        outputs,
        inputs,
        adapters,
        rows_of_x.stride(0),
        weight.stride(0),
        weight.stride(1),
        TRANSPOSED=is_transposed,
        BLOCK_M=launch.BLOCK_M,
        BLOCK_N=launch.BLOCK_N,
        BLOCK_K=launch.BLOCK_K,
        SPLIT_K=launch.SPLIT_K,
        GROUP_M=launch.GROUP_M,
        TMA=launch.TMA,
        WIDEN=INTERPRETED.value or x.dtype == torch.float32,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if is_split:
        combine_fwd_kernel[(triton.cdiv(rows, 4), triton.cdiv(outputs, 256))](
            target,
            bias,
            scales[1],
            index,
            out,
            rows,
            outputs,
            adapters,
            SPLIT_K=launch.SPLIT_K,
            BLOCK_M=4,
            BLOCK_N=256,
            num_warps=4,
        )
    return out
