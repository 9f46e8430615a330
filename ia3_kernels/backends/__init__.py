"""Which implementation runs an operator, and why.

A backend is one file that ends in a `Backend`; adding one is that file and its line in `_BACKENDS`. The dispatcher sees
a single kernel per operator, which asks `choose`. Backends stand in order of preference.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import target
from ..schemas import LIBRARY, SCHEMAS
from . import cuda, native, reference, triton
from .base import Backend

_BACKENDS: tuple[Backend, ...] = (native.BACKEND, triton.BACKEND, cuda.BACKEND, reference.BACKEND)


@dataclass(frozen=True)
class Choice:
    """The backend that runs an operator for a device and dtype, and the reason in words."""

    backend: str
    reason: str


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here, and the reason in words."""

    name: str
    available: bool
    reason: str


def get(name: str) -> Backend:
    """The backend called `name`; raises ValueError where there is none and RuntimeError where it cannot run here."""
    for backend in _BACKENDS:
        if backend.name == name:
            problem = backend.unavailable()
            if problem is not None:
                raise RuntimeError(f"ia3_kernels: the backend {name!r} was asked for by name, but {problem}")
            return backend
    names = ", ".join(repr(backend.name) for backend in _BACKENDS)
    raise ValueError(f"ia3_kernels: there is no backend {name!r}; expected one of {names}, or 'auto'.")


def report() -> list[BackendStatus]:
    """Every backend with its status here, in order of preference."""
    return [
        BackendStatus(backend.name, problem is None, problem or backend.description)
        for backend in _BACKENDS
        for problem in [backend.unavailable()]
    ]


@functools.cache
def _warn_fallback(problem: str) -> None:
    warnings.warn(f"ia3_kernels: running the slower torch reference because {problem}", RuntimeWarning, stacklevel=4)


@functools.cache
def choose(op: str, device_type: str, dtype: torch.dtype) -> tuple[Backend, str]:
    """The backend for `op` on tensors of this device and dtype, with the reason."""
    requested = target.requested_backend()
    if requested != "auto":
        backend = get(requested)
        gap = backend.gap(op, device_type, dtype)
        if gap is not None:
            raise RuntimeError(
                f"{op}: the backend {requested!r} was asked for by {target.BACKEND_VARIABLE}, but {gap}; "
                f"unset the variable to let ia3_kernels choose."
            )
        return backend, f"asked for by {target.BACKEND_VARIABLE}={requested}"
    passed_over: list[str] = []
    for backend in _BACKENDS:
        problem = backend.unavailable()
        gap = problem or backend.gap(op, device_type, dtype)
        if gap is None:
            reason = "; ".join(passed_over) or f"first choice for {device_type}"
            return backend, reason
        passed_over.append(f"{backend.name}: {gap}")
        if problem is not None and device_type in backend.device_types:
            _warn_fallback(problem)
    raise RuntimeError(f"{op}: no backend runs {dtype} on {device_type}: {'; '.join(passed_over)}")


def explain(
    op: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    shape: Sequence[int] | None = None,
) -> Choice:
    """Say which backend will run an operator, and why.

    op: a name in the ``ia3::`` namespace. shape: for ``scaled_linear``, ``(rows, out_features, in_features)``, on which
    its matmul depends. Raises ValueError for an unknown operator or shape.
    """
    if op not in SCHEMAS:
        raise ValueError(f"explain: there is no operator {op!r}; expected one of {', '.join(SCHEMAS)}.")
    if shape is not None and op == "scaled_linear" and len(shape) != 3:
        raise ValueError(f"explain: shape is {tuple(shape)}; expected (rows, out_features, in_features).")
    device = torch.device(device)
    backend, reason = choose(op, device.type, dtype)
    detail = backend.detail(op, device, dtype, shape)
    return Choice(backend.name, f"{reason}; {detail}" if detail else reason)


def run(op: str, first: torch.Tensor, *args: object, **kwargs: object) -> object:
    """Run an operator on the backend of its first tensor, with no gradient recorded."""
    backend, _ = choose(op, first.device.type, first.dtype)
    return backend.operators[op](first, *args, **kwargs)


def _register(op: str) -> None:
    kernel = functools.partial(run, op)

    # One kernel for every device: `choose` knows the device, so the dispatcher need not.
    LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")


for _op in SCHEMAS:
    _register(_op)
