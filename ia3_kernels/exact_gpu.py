"""Scaling whose undoing is bit-exact, on GPUs: what the host does around a kernel of CUDA or Triton.

One pass reads and writes a weight. It leaves alone every unit, a warp's adjacent weights of a row, that has escapes,
and counts them; so the host need not know how many there are until it asks, once, for all weights that it has in hand.
If there are any, a second launch visits those units alone. If there is no memory for them, one takes back all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass
class Move:
    """A matrix on its way from one scale to another; None is no scale.

    parity: made where there is no ``old``. escapes: positions and bits of those that ``old`` left. workspace: how many
    ``new`` leaves.
    """

    weight: Tensor
    old: Tensor | None
    new: Tensor | None
    dim: int
    parity: Tensor | None = None
    escapes: Sequence[Tensor] = ()
    workspace: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return what a kernel takes after its mode."""
        escapes = self.escapes or (None, None)
        return self.weight, self.old, self.new, self.dim, self.parity, *escapes, self.workspace


def move_all(kernel: Kernel, unit: int, moves: Sequence[Move]) -> list[tuple[Tensor, Tensor]]:
    """Take what each weight holds out of it and put its new scale in: all weights, or after an error none.

    Returns the positions and bits of the new escapes. Waits for a device once, and not at all where nothing is put in.
    """
    done: list[Move] = []
    found: list[tuple[Tensor, Tensor]] = []
    offsets: list[Tensor | None] = []
    try:
        for move in moves:
            weight = move.weight
            if move.parity is None:
                move.parity = weight.new_empty(parity_shape(weight), dtype=torch.uint8)
            if not move.escapes or not len(move.escapes[0]):
                move.escapes = ()
            if move.new is not None or move.escapes or len(moves) > 1:
                size = _HEAD + weight.shape[0] * -(-weight.shape[1] // unit)
                move.workspace = weight.new_empty(size, dtype=torch.int16)
            kernel(MOVE, *move.arguments)
            done.append(move)
        for move, count in zip(moves, _counts(moves), strict=True):
            weight = move.weight
            bits = weight.new_empty(count, dtype=pattern_dtype(weight.dtype))
            found.append((weight.new_empty(count, dtype=torch.int64), bits))
            offsets.append(counts_of(move.workspace).cumsum(0) if count and move.workspace is not None else None)
    except BaseException:
        for move in done:
            kernel(TAKE_BACK, move.weight, move.new, move.old, move.dim, move.parity, None, None, move.workspace)
        raise
    for move, ends, escapes in zip(moves, offsets, found, strict=True):
        if ends is not None:
            kernel(COLLECT, *move.arguments, ends, *escapes)
    return found


def _counts(moves: Sequence[Move]) -> list[int]:
    """Return how many escapes each weight has, asking each device once."""
    counts = [0] * len(moves)
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for index, move in enumerate(moves):
        if move.new is not None and move.workspace is not None and move.weight.numel():
            by_device.setdefault(move.weight.device, {})[index] = total_of(move.workspace)
    for totals in by_device.values():
        for index, count in zip(totals, torch.cat([*totals.values()]).tolist(), strict=True):
            counts[index] = count
    return counts


def operators(kernel: Kernel, unit: int) -> dict[str, Callable[..., Any]]:
    """Return the operators of exact merging around a kernel, whose units have so many weights."""

    def merge_exact_(weight: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        step = Move(weight, None, scale, dim)
        escapes = move_all(kernel, unit, [step])[0]
        assert step.parity is not None
        return step.parity, *escapes

    def unmerge_exact_(weight: Tensor, scale: Tensor, dim: int, parity: Tensor, *escapes: Tensor) -> None:
        check_positions("unmerge_exact_", weight, escapes[0])
        move_all(kernel, unit, [Move(weight, scale, None, dim, parity, escapes)])

    def swap_exact_(
        weight: Tensor, old_scale: Tensor, new_scale: Tensor, dim: int, parity: Tensor, *escapes: Tensor
    ) -> tuple[Tensor, Tensor]:
        check_positions("swap_exact_", weight, escapes[0])
        return move_all(kernel, unit, [Move(weight, old_scale, new_scale, dim, parity, escapes)])[0]

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
