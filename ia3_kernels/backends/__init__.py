"""The choice of what runs an operator, and its reason.

A backend is one file that ends in a `Backend`; adding one is that file and its line in `_BACKENDS`. They stand in order
of preference. The dispatcher sees a single kernel per operator: the native library's, which asks here once for each
device and dtype, or where there is none, the ones at the end of this file.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import matmul, routes, target
from ..chunks import chunks_by_adapter
from ..launches import activation_launch
from ..schemas import COMPILED, DIFFERENTIABLE, EXACT, LIBRARY, SCHEMAS, check_arguments, index_of, refuse_tangents
from . import cuda, native, reference, triton
from .base import Backend

_BACKENDS: tuple[Backend, ...] = (native.BACKEND, cuda.BACKEND, triton.BACKEND, reference.BACKEND)


@dataclass(frozen=True)
class Choice:
    """The backend that runs an operator for a device and dtype, and the reason in words."""

    backend: str
    reason: str


@dataclass(frozen=True)
class BackendStatus:
    """A backend that can run here or cannot, and the reason in words."""

    name: str
    available: bool
    reason: str


def get(name: str) -> Backend:
    """Return the backend called `name`; raises ValueError where there is none, RuntimeError where it cannot run."""
    for backend in _BACKENDS:
        if backend.name == name:
            problem = backend.unavailable()
            if problem is not None:
                raise RuntimeError(f"ia3_kernels: the backend {name!r} was asked for by name, but {problem}")
            return backend
    names = ", ".join(repr(backend.name) for backend in _BACKENDS)
    raise ValueError(f"ia3_kernels: there is no backend {name!r:.200}; expected one of {names}, or 'auto'.")


def report() -> list[BackendStatus]:
    """Return every backend with its status here, in order of preference."""
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
    """Return the backend for `op` on tensors of this device and dtype, with the reason."""
    requested = target.requested_backend()
    if requested != "auto":
        backend = get(requested)
        if op not in backend.operators and op not in backend.compiled:
            return reference.BACKEND, f"{requested} has no kernel for it"
        gap = backend.gap(op, device_type, dtype)
        if gap is not None:
            raise RuntimeError(
                f"{op}: the backend {requested!r:.200} was asked for by {target.BACKEND_VARIABLE}, but {gap}; "
                f"unset the variable to let ia3_kernels choose."
            )
        return backend, f"asked for by {target.BACKEND_VARIABLE}={requested}"
    passed_over: list[str] = []
    problems: list[str] = []
    for backend in _BACKENDS:
        problem = backend.unavailable()
        gap = problem or backend.gap(op, device_type, dtype)
        if gap is None:
            if backend is reference.BACKEND and problems:
                _warn_fallback("; ".join(problems))
            return backend, "; ".join(passed_over) or f"first choice for {device_type}"
        passed_over.append(f"{backend.name}: {gap}")
        if problem is not None and device_type in backend.device_types:
            problems.append(problem)
    raise RuntimeError(f"{op}: no backend runs {dtype} on {device_type}: {'; '.join(passed_over)}")


def prefers_native() -> bool:
    """Return whether CPU tensors run in the compiled kernels, as far as their device and dtype are concerned."""
    return target.requested_backend() in ("auto", "native") and native.BACKEND.unavailable() is None


def refresh() -> None:
    """Choose anew from here on.

    What runs an operator is chosen at its first call for a device, dtype and, for a GPU's matmul, shape, from
    IA3_BACKEND, IA3_GPU_MATMUL and what `ia3 tune` has measured. Call this after one of them has changed: neither
    variable is read again before. `explain` says what they do.
    """
    target.forget_variables()
    choose.cache_clear()
    matmul.forget_choices()
    library = target.native_library()
    if isinstance(library, ModuleType):
        library.forget_choices()


def explain(
    op: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shape: Sequence[int] | None = None,
) -> Choice:
    """Say which backend will run an operator, and why.

    Args:
        op: a name in the ``ia3::`` namespace.
        device: where its tensors are; by default the GPU, where there is one.
        dtype: of its tensors.
        shape: for ``scaled_linear``, ``(rows, out_features, in_features)``, on which its matmul depends.

    Raises:
        ValueError: the operator or the shape is none.
        RuntimeError: a backend was asked for by name that cannot run it.
    """
    if op not in SCHEMAS:
        raise ValueError(f"explain: there is no operator {op!r}; expected one of {', '.join(SCHEMAS)}.")
    if shape is not None and op == "scaled_linear" and len(shape) != 3:
        raise ValueError(f"explain: shape is {tuple(shape)}; expected (rows, out_features, in_features).")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    backend, reason = choose(op, device.type, dtype)
    detail = backend.detail(op, device, dtype, shape)
    return Choice(backend.name, f"{reason}; {detail}" if detail else reason)


# --- what the native library asks for (csrc/torch/python_backend.cpp) ----------------------------------------------


def run(op: str, first: Tensor, *args: Any) -> Any:
    """Run an operator of a backend written in Python; checked arguments, no gradient recorded."""
    backend, _ = choose(op, first.device.type, first.dtype)
    return backend.operators[op](first, *args)


def linear_route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    adapter_index: Tensor | None,
    is_capturing: bool,
) -> tuple[str, str, int, bool]:
    """Choose how the CUDA backend computes a product: outside of CUDA graphs, inside, the tile, whether that holds.

    The kernel of a route that only graphs take has to be compiled and loaded before there is a graph, since a capture
    allows neither: it is run here once, and its result dropped. Where a capture comes first it goes without.
    """
    product = matmul.product_of(x, weight, "input" if output_scale is None else "output")
    eager, captured = (
        routes.linear_route(x.device.index, product, routes.available(), is_captured, adapter_index is not None)
        for is_captured in (False, True)
    )
    tile = target.hopper_tile(captured.tile)
    if captured.name == "triton" != eager.name:
        if is_capturing:
            return eager.name, eager.name, tile, False
        linear_by_triton(x, weight, bias, input_scale, output_scale, adapter_index)
    return eager.name, captured.name, tile, True


def linear_by_triton(x: Tensor, *args: Any) -> Tensor:
    """Run ``scaled_linear`` in Triton, with the launch that was measured for its shape."""
    return triton.on_its_device(matmul.by_triton)(x, *args)  # type: ignore[no-any-return]


def chunks(adapter_index: Tensor, adapters: int, gate: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of each adapter as the CUDA kernels sum them: the tensors of ``Chunks``, all int32."""
    index = adapter_index.reshape(-1)
    launch = activation_launch(index.numel(), gate.shape[-1], gate.element_size(), is_backward=True)
    order, *rest = chunks_by_adapter(index, adapters, launch.CHUNK)
    return order.to(torch.int32), *rest


# --- registration --------------------------------------------------------------------------------------------------


def _scaled_linear_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    output_scale: Tensor,
    adapter_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    product = run("scaled_linear", x, weight, bias, input_scale, None, index_of(input_scale, adapter_index))
    return run("scaled_activation", product, output_scale, "identity", index_of(output_scale, adapter_index)), product


def _register(op: str) -> None:
    """Register an operator whose kernel Python finds."""

    execute = functools.partial(run, op) if op != "scaled_linear_product" else _scaled_linear_product

    def kernel(first: Tensor, *args: Any) -> Any:
        check_arguments(op, first, *args)
        return execute(first, *args)

    LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")


def _register_refusal(op: str) -> None:
    """Tell autograd of an operator that is not differentiable."""
    operator = getattr(torch.ops.ia3, op)

    def refuse(*args: Any) -> Any:
        refuse_tangents(op, *args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            raise RuntimeError(
                f"{op}: an argument requires grad, and the operator is not differentiable; call it under "
                "torch.no_grad()."
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    LIBRARY.impl(op, refuse, "Autograd")


def _register_in_place(op: str) -> None:
    """Tell torch's counter of versions of an operator that writes over its first argument."""
    operator = getattr(torch.ops.ia3, op)
    is_noted = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

    def note(weight: Tensor, *args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(is_noted):
            result = operator(weight, *args)
        torch.autograd.graph.increment_version(weight)
        return result

    LIBRARY.impl(op, note, "ADInplaceOrView")  # in inference mode too, where a weight may be part of a graph


def _register_all() -> None:
    is_built = isinstance(target.native_library(), ModuleType)
    for op in EXACT if is_built else (*EXACT, *COMPILED):
        if op not in ("gated_mlp", "mlp"):  # made of others, in autograd.py
            _register(op)
        if op.endswith("_"):
            _register_in_place(op)
        if op not in DIFFERENTIABLE:
            _register_refusal(op)


_register_all()
