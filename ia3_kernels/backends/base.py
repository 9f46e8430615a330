"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..moves import Move


def _always() -> str | None:
    return None


def _no_detail(op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """A set of operator implementations for some devices and dtypes.

    operators: those written in Python, by name; they get checked arguments and record no gradient.
    compiled: the names of those that the native library calls by itself (csrc/torch/backend.h).
    unavailable: says in words why the backend cannot run in this process, or None.
    detail: adds how an operator will run, for `explain`.
    moves: goes many ways of exact merging on one device, all or none; its list gets the results of all at the end.
        None: they are gone by the operators, one after the other.
    """

    name: str
    description: str
    device_types: frozenset[str]
    dtypes: frozenset[torch.dtype]
    operators: Mapping[str, Callable[..., object]]
    compiled: frozenset[str] = frozenset()
    unavailable: Callable[[], str | None] = field(default=_always)
    detail: Callable[[str, torch.device, torch.dtype, Sequence[int] | None], str] = field(default=_no_detail)
    moves: Callable[[Sequence[Move], list[Any]], None] | None = None

    def gap(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        """Return why this backend does not run `op` for that device and dtype, or None where it does."""
        if self.device_types and device_type not in self.device_types:
            return f"it runs on {', '.join(sorted(self.device_types))} tensors and these are on {device_type}"
        if dtype not in self.dtypes:
            return f"it has no {str(dtype).removeprefix('torch.')} kernels"
        if op not in self.operators and op not in self.compiled:
            return f"it does not implement {op}"
        return None
