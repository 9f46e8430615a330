"""Scaling whose undoing is bit-exact, on GPUs: what the host does around a kernel of CUDA or Triton.

One pass reads and writes a weight. It leaves alone every unit, a warp's adjacent weights of a row, that has escapes,
and counts them; so the host need not know how many there are until it asks, once. If there are any, a second launch
visits those units alone. If there is no memory for them, one takes back all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .exact_reference import check_positions
from .schemas import parity_shape, pattern_dtype

# What a launch does; ia3_exact_mode of csrc/include/ia3_kernels.h says more.
MOVE, COLLECT, TAKE_BACK, CHECK = range(4)
_HEAD = 4  # int16 before the units' counts: an int64, the sum of all

# (mode, weight, old_scale, new_scale, dim, parity, positions, bits, workspace, offsets, new_positions, new_bits)
Kernel = Callable[..., None]


def total_of(workspace: Tensor) -> Tensor:
    """Return the number of all escapes, an int64 ``[1]``."""
    return workspace[:_HEAD].view(torch.int64)


def counts_of(workspace: Tensor) -> Tensor:
    """Return the number of escapes in each unit, int16 ``[rows * units of a row]``; negative: holds old ones."""
    return workspace[_HEAD:]


def _move(
    kernel: Kernel,
    unit: int,
    weight: Tensor,
    old: Tensor | None,
    new: Tensor | None,
    dim: int,
    parity: Tensor,
    *escapes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take an old scale out of a weight and put a new one in (None: no scale); after an error it is as it was.

    escapes: positions and bits of those that ``old`` left. Returns those of the new ones. Waits for the device once,
    and not at all where nothing is put in.
    """
    positions, bits = escapes if escapes and len(escapes[0]) else (None, None)
    workspace = None
    if new is not None or positions is not None:
        workspace = weight.new_empty(_HEAD + weight.shape[0] * -(-weight.shape[1] // unit), dtype=torch.int16)
    arguments = weight, old, new, dim, parity, positions, bits, workspace
    kernel(MOVE, *arguments)
    try:
        count = 0 if new is None or workspace is None or not weight.numel() else int(total_of(workspace))
        found = weight.new_empty(count, dtype=torch.int64), weight.new_empty(count, dtype=pattern_dtype(weight.dtype))
        offsets = counts_of(workspace).cumsum(0) if count and workspace is not None else None
    except BaseException:
        kernel(TAKE_BACK, weight, new, old, dim, parity, None, None, workspace)
        raise
    if offsets is not None:
        kernel(COLLECT, *arguments, offsets, *found)
    return found


def operators(kernel: Kernel, unit: int) -> dict[str, Callable[..., Any]]:
    """Return the operators of exact merging around a kernel, whose units have so many weights."""
    move = functools.partial(_move, kernel, unit)

    def merge_exact_(weight: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        parity = weight.new_empty(parity_shape(weight), dtype=torch.uint8)
        return parity, *move(weight, None, scale, dim, parity)

    def unmerge_exact_(weight: Tensor, scale: Tensor, dim: int, parity: Tensor, *escapes: Tensor) -> None:
        check_positions("unmerge_exact_", weight, escapes[0])
        move(weight, scale, None, dim, parity, *escapes)

    def swap_exact_(
        weight: Tensor, old_scale: Tensor, new_scale: Tensor, dim: int, parity: Tensor, *escapes: Tensor
    ) -> tuple[Tensor, Tensor]:
        check_positions("swap_exact_", weight, escapes[0])
        return move(weight, old_scale, new_scale, dim, parity, *escapes)

    def stays_finite(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
        if not weight.numel():
            return weight.new_ones((), dtype=torch.bool)
        workspace = weight.new_empty(_HEAD, dtype=torch.int16)
        kernel(CHECK, weight, None, scale, dim, None, None, None, workspace)
        return workspace.view(torch.bool)[0]

    return {
        "merge_exact_": merge_exact_,
        "unmerge_exact_": unmerge_exact_,
        "swap_exact_": swap_exact_,
        "stays_finite": stays_finite,
    }
