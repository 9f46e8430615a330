"""Weights on their way from one exactly merged scale to another: what such a way is, and how operators go it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Move(NamedTuple):
    """A weight's way from an old scale to a new one; None is no scale. Shapes and devices were checked.

    dim: 0 for scales ``[rows]``, 1 for ``[groups, cols]``.
    residual: parity, positions and bits that the old scale left; empty where there is no old scale.
    """

    weight: Tensor
    old: Tensor | None
    new: Tensor | None
    dim: int
    residual: tuple[Tensor, ...] = ()

    @property
    def operator(self) -> str:
        """Return the name of the operator that goes this way."""
        return "merge_exact_" if self.old is None else "unmerge_exact_" if self.new is None else "swap_exact_"

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the operator's arguments."""
        return self.weight, *(scale for scale in (self.old, self.new) if scale is not None), self.dim, *self.residual

    def left(self, result: Any) -> tuple[Tensor, ...]:
        """Return parity, positions and bits that the new scale leaves, from the operator's result."""
        return () if result is None else (*self.residual[:1], *result)

    def back(self, result: Any) -> Move:
        """Return the way back, from the operator's result."""
        return Move(self.weight, self.new, self.old, self.dim, self.left(result))


def move_each(operator: Callable[[str], Callable[..., Any]], moves: Sequence[Move], done: list[Any]) -> None:
    """Go one way after the other; ``done`` gets each result in one step with the weight.

    operator: finds an operator by its name.
    """
    for move in moves:
        # In one instruction with the operator: between two, an interrupt may come.
        done.extend(itertools.starmap(operator(move.operator), [move.arguments]))
