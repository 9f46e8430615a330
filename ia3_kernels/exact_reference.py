"""Scaling whose undoing is bit-exact, in plain torch; ``docs/exact-merging.md`` has the coding and its proof.

The arithmetic is that of ``csrc/core/exact_scale.h``, operation by operation, because what one backend merges another
must be able to undo. fp64, which only the reference knows, has nothing wider to divide in: there the two candidates
beside a quotient are tried. Works in blocks of rows, so that temporaries stay below a megabyte on a CPU, and elsewhere
below a few hundredths of the weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .schemas import parity_shape, pattern_dtype

_CPU_BLOCK = 8192  # weights; some ten temporaries of up to eight bytes each
_BLOCKS_ELSEWHERE = 256
# What quotients are computed in, beside which an ulp of the weight's dtype is large.
_WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def _blocks(weight: Tensor) -> Iterator[slice]:
    elements = _CPU_BLOCK if weight.device.type == "cpu" else max(_CPU_BLOCK, weight.numel() // _BLOCKS_ELSEWHERE)
    step = max(1, elements // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Scaling:
    """What multiplies the rows of a weight: a scale for each row, or one for the columns of each group of rows."""

    def __init__(self, weight: Tensor, scale: Tensor, dim: int) -> None:
        scale = scale.to(_compute_dtype(weight.dtype))
        self.weight, self.dim = weight, dim
        self.scale = scale.unsqueeze(1) if dim == 0 else scale  # [rows, 1] or [groups, cols]

    def of(self, rows: slice) -> Tensor:
        if self.dim == 0:
            return self.scale[rows]
        groups = len(self.scale)
        if groups == 1:
            return self.scale
        row = torch.arange(rows.start, rows.stop, device=self.scale.device)
        return self.scale[row // (len(self.weight) // groups)]

    def scaled(self, rows: slice) -> Tensor:
        """Compute w' = round(w l)."""
        return (self.weight[rows].to(self.scale.dtype) * self.of(rows)).to(self.weight.dtype)

    def unscaled(self, merged: Tensor, odd: Tensor, rows: slice) -> Tensor:
        """Return the pattern next to w' / l whose lowest bit is that of ``odd``."""
        pattern, scale = pattern_dtype(merged.dtype), self.of(rows)
        wide = _WIDE.get(merged.dtype)
        if wide is None:
            near = (merged / scale).view(pattern)
            is_above = (near + 1).view(merged.dtype) * scale == merged
            return torch.where((near ^ odd) & 1 == 1, torch.where(is_above, near + 1, near - 1), near)
        quotient = merged.to(wide) * (1 / scale.to(wide))
        nearest = quotient.to(merged.dtype)
        low = nearest.view(pattern) - (nearest.to(wide).abs() > quotient.abs()).to(pattern)  # towards zero
        # Which NaN a conversion gives is the device's affair, and one above the largest of them would be zero.
        low = low.masked_fill(quotient.isnan(), torch.tensor(float("nan"), dtype=merged.dtype).view(pattern).item())
        return low + ((low ^ odd) & 1)


def _packed(odd: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pack lowest bits, eight to a byte: bit i of byte j is column 8 j + i."""
    padded = torch.nn.functional.pad(odd.to(torch.uint8), (0, 8 * shape[1] - odd.shape[1]))
    powers = torch.bitwise_left_shift(torch.ones(8, dtype=torch.uint8, device=odd.device), _counter(odd))
    return (padded.view(len(odd), -1, 8) * powers).sum(-1, dtype=torch.uint8)


def _unpacked(parity: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
    bits = torch.bitwise_right_shift(parity.unsqueeze(-1), _counter(parity)) & 1
    return bits.flatten(1)[:, :cols].to(dtype)


def _counter(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


_Escapes = tuple[list[Tensor], list[Tensor]]  # positions and bits, a pair a block


def _merge_rows(scaling: _Scaling, rows: slice, parity: Tensor, escapes: _Escapes) -> None:
    weight = scaling.weight
    before = weight[rows].view(pattern_dtype(weight.dtype)).clone(memory_format=torch.contiguous_format)
    after = scaling.scaled(rows)
    wrong = (scaling.unscaled(after, before, rows) != before) | after.isnan()
    place = wrong.view(-1).nonzero().view(-1)
    escapes[0].append(place + rows.start * weight.shape[1])
    escapes[1].append(before.view(-1)[place])
    parity[rows] = _packed(before & 1, (len(before), parity.shape[1]))
    weight[rows] = after


def _unmerge_rows(scaling: _Scaling, rows: slice, parity: Tensor, positions: Tensor, bits: Tensor) -> None:
    weight, cols = scaling.weight, scaling.weight.shape[1]
    odd = _unpacked(parity[rows], cols, bits.dtype)
    before = scaling.unscaled(weight[rows].contiguous(), odd, rows)
    before.view(-1)[positions - rows.start * cols] = bits
    weight[rows] = before.view(weight.dtype)


def _joined(escapes: _Escapes, weight: Tensor) -> tuple[Tensor, Tensor]:
    nothing = weight.new_empty(0, dtype=torch.int64), weight.new_empty(0, dtype=pattern_dtype(weight.dtype))
    return torch.cat([nothing[0], *escapes[0]]), torch.cat([nothing[1], *escapes[1]])


def check_positions(*cases: tuple[str, Tensor, Tensor]) -> None:
    """Raise a sentence unless positions of residuals ascend within their weights; waits for a GPU where there are any.

    cases: operator, weight and positions of each; all on one device.
    """
    cases = tuple(case for case in cases if len(case[2]))
    fit = [
        (positions.diff() > 0).all() & (positions[0] >= 0) & (positions[-1] < weight.numel())
        for _, weight, positions in cases
    ]
    for (op, weight, _), fits in zip(cases, torch.stack(fit).tolist() if fit else (), strict=True):
        if not fits:
            raise RuntimeError(
                f"{op}: positions are not ascending, or not below {weight.numel()}; expected the residual of a merge."
            )


def _by_block(blocks: list[slice], weight: Tensor, positions: Tensor) -> list[slice]:
    """Return which of the positions lie in each block."""
    edges = [0, *(rows.stop * weight.shape[1] for rows in blocks)]
    found = torch.searchsorted(positions, torch.tensor(edges, device=positions.device)).tolist()
    return [slice(first, last) for first, last in itertools.pairwise(found)]


def _all_or_nothing(blocks: list[slice], forward: Callable[[int], None], backward: Callable[[int], None]) -> None:
    """Run ``forward`` on every block; after an exception, ``backward`` on those that it has done."""
    done = 0
    try:
        for index in range(len(blocks)):
            forward(index)
            done += 1
    except BaseException:
        for index in range(done):
            backward(index)
        raise


def merge_exact_(weight: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    scaling, blocks = _Scaling(weight, scale, dim), list(_blocks(weight))
    parity = weight.new_empty(parity_shape(weight), dtype=torch.uint8)
    escapes: _Escapes = ([], [])

    def backward(index: int) -> None:
        _unmerge_rows(scaling, blocks[index], parity, escapes[0][index], escapes[1][index])

    _all_or_nothing(blocks, lambda index: _merge_rows(scaling, blocks[index], parity, escapes), backward)
    return parity, *_joined(escapes, weight)


def unmerge_exact_(weight: Tensor, scale: Tensor, dim: int, parity: Tensor, positions: Tensor, bits: Tensor) -> None:
    check_positions(("unmerge_exact_", weight, positions))
    scaling, blocks = _Scaling(weight, scale, dim), list(_blocks(weight))
    found = _by_block(blocks, weight, positions)

    def forward(index: int) -> None:
        _unmerge_rows(scaling, blocks[index], parity, positions[found[index]], bits[found[index]])

    _all_or_nothing(blocks, forward, lambda index: _merge_rows(scaling, blocks[index], parity, ([], [])))


def swap_exact_(
    weight: Tensor, old_scale: Tensor, new_scale: Tensor, dim: int, parity: Tensor, positions: Tensor, bits: Tensor
) -> tuple[Tensor, Tensor]:
    check_positions(("swap_exact_", weight, positions))
    old, new, blocks = _Scaling(weight, old_scale, dim), _Scaling(weight, new_scale, dim), list(_blocks(weight))
    found = _by_block(blocks, weight, positions)
    escapes: _Escapes = ([], [])

    def forward(index: int) -> None:
        rows, own = blocks[index], found[index]
        _unmerge_rows(old, rows, parity, positions[own], bits[own])
        try:
            _merge_rows(new, rows, parity, escapes)
        except BaseException:
            _merge_rows(old, rows, parity, ([], []))
            raise

    def backward(index: int) -> None:
        rows = blocks[index]
        _unmerge_rows(new, rows, parity, escapes[0][index], escapes[1][index])
        _merge_rows(old, rows, parity, ([], []))

    _all_or_nothing(blocks, forward, backward)
    return _joined(escapes, weight)


def stays_finite(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
    scaling = _Scaling(weight, scale, dim)
    finite = [scaling.scaled(rows).isfinite().all() for rows in _blocks(weight)]
    return torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool, device=weight.device)


OPERATORS: dict[str, Callable[..., object]] = {
    "merge_exact_": merge_exact_,
    "unmerge_exact_": unmerge_exact_,
    "swap_exact_": swap_exact_,
    "stays_finite": stays_finite,
}
