"""Scaling whose undoing is bit-exact, on GPUs: what the host does around a kernel of CUDA or Triton.

One pass reads and writes a weight. It leaves alone every unit, a warp's adjacent weights of a row, that has escapes,
and counts them; so the host need not know how many there are until it asks, once for all the weights that it has
launched. If there are any, a second launch visits those units alone. If there is no memory for them, one takes back all
others. Where old scales left escapes, it asks once before that whether their positions are in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .exact_reference import check_positions
from .moves import Move
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


class _Launch(NamedTuple):
    """What a kernel takes for a move; its arguments after the mode, in order."""

    weight: Tensor
    old: Tensor | None
    new: Tensor | None
    dim: int
    parity: Tensor
    positions: Tensor | None
    bits: Tensor | None
    workspace: Tensor | None


def _launch_of(unit: int, move: Move) -> tuple[_Launch, Tensor]:
    """Return the arguments of a move's launch, and its workspace, which one that only takes out needs to go back."""
    weight, old, new, dim, residual = move
    workspace = weight.new_empty(_HEAD + weight.shape[0] * -(-weight.shape[1] // unit), dtype=torch.int16)
    positions: Tensor | None = None
    bits: Tensor | None = None
    if residual:
        parity, *escapes = residual
        positions, bits = escapes if len(escapes[0]) else (None, None)
    else:
        parity = weight.new_empty(parity_shape(weight), dtype=torch.uint8)
    is_needed = new is not None or positions is not None
    return _Launch(weight, old, new, dim, parity, positions, bits, workspace if is_needed else None), workspace


def _escapes(launches: Sequence[_Launch]) -> list[int]:
    """Return how many escapes each launch has found; waits for the device once, or not where nothing is put in."""
    workspaces = [launch.workspace if launch.new is not None and launch.weight.numel() else None for launch in launches]
    totals = [total_of(workspace) for workspace in workspaces if workspace is not None]
    found = iter(torch.cat(totals).tolist() if totals else ())
    return [0 if workspace is None else next(found) for workspace in workspaces]


def move_all(kernel: Kernel, unit: int, moves: Sequence[Move], done: list[Any]) -> None:
    """Take old scales out of weights of one device and put new ones in; after an exception none has changed.

    After an interrupt neither, if the kernel is a compiled function, which either has run or has not. ``done`` gets the
    results of all at the end. ``unit``: how many weights one of the kernel's has.
    """
    check_positions(*((move.operator, move.weight, move.residual[1]) for move in moves if move.residual))
    before = len(done)
    prepared: list[tuple[_Launch, Tensor]] = []
    collects: list[tuple[Any, ...]] = []
    # What the kernel returned, None for each launch: in one instruction with it, since an interrupt comes between two.
    moved: list[None] = []
    collected: list[None] = []
    try:
        for move in moves:
            prepared.append(_launch_of(unit, move))
            moved.extend(itertools.starmap(kernel, [(MOVE, *prepared[-1][0])]))
        launches = [launch for launch, _ in prepared]
        counts = _escapes(launches)
        found = [
            (weight.new_empty(count, dtype=torch.int64), weight.new_empty(count, dtype=pattern_dtype(weight.dtype)))
            for (weight, *_), count in zip(launches, counts, strict=True)
        ]
        results = [
            None if launch.new is None else escapes if launch.old is not None else (launch.parity, *escapes)
            for launch, escapes in zip(launches, found, strict=True)
        ]
        # Once these are there, so is all the memory, and whatever cuts them short, they are finished first.
        collects = [
            (COLLECT, *launch, counts_of(launch.workspace).cumsum(0), *escapes)
            for launch, count, escapes in zip(launches, counts, found, strict=True)
            if count and launch.workspace is not None
        ]
        for arguments in collects:
            collected.extend(itertools.starmap(kernel, [arguments]))
        done.extend(results)
    except BaseException:
        if len(done) > before:
            raise
        if collects:
            for arguments in collects[len(collected) :]:
                kernel(*arguments)
            back = [move.back(result) for move, result in zip(moves, results, strict=True)]
            move_all(kernel, unit, back[::-1], [])
            raise
        for launch, workspace in reversed(prepared[: len(moved)]):
            weight, old, new, dim, parity, *_ = launch
            if launch.workspace is None:
                workspace.zero_()  # no unit has escapes
            kernel(TAKE_BACK, weight, new, old, dim, parity, None, None, workspace)
        raise


def operators(kernel: Kernel, unit: int) -> dict[str, Callable[..., Any]]:
    """Return the operators of exact merging around a kernel, whose units have so many weights."""

    def go(*move: Any) -> Any:
        done: list[Any] = []
        move_all(kernel, unit, [Move(*move)], done)
        return done[0]

    def merge_exact_(weight: Tensor, scale: Tensor, dim: int) -> Any:
        return go(weight, None, scale, dim)

    def unmerge_exact_(weight: Tensor, scale: Tensor, dim: int, *residual: Tensor) -> None:
        go(weight, scale, None, dim, residual)

    def swap_exact_(weight: Tensor, old_scale: Tensor, new_scale: Tensor, dim: int, *residual: Tensor) -> Any:
        return go(weight, old_scale, new_scale, dim, residual)

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
