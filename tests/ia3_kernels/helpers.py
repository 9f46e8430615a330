"""Shared by the operator tests: the oracle, its error measure, and the shapes that break kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ia3_kernels import backends, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# As transformers computes them
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}

needs_native = pytest.mark.skipif(
    backends.native.BACKEND.unavailable() is not None, reason="the native library is not built"
)


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory that Python code allocates hold NaN (or the dtype's least integer) until it is written."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            memory = allocate(*args, **kwargs)
            return memory.fill_(float("nan") if memory.is_floating_point() else torch.iinfo(memory.dtype).min)

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


def error(result: Tensor, oracle: Tensor) -> float:
    """Relative L2 error; NaN and missing writes count as infinite."""
    if not torch.isfinite(result).all():
        return float("inf")
    distance = (result.double() - oracle.double()).norm()
    return float(distance / oracle.double().norm().clamp_min(1e-30))


def upcast(value: Any) -> Any:
    """The same argument in fp64; scales and operands alike."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_accurate(
    operator: Callable[..., Any], name: str, *args: Any, eager: Callable[..., Any] | None = None
) -> None:
    """`operator`'s error against the fp64 oracle is at most twice the eager formula's in the same dtype.

    The eager formula errs by chance as well; half an ulp of the input's dtype, where a rounding to it is unavoidable,
    is the floor below which neither can go. Over n elements either error is a sample, which spreads by 1 / √n.
    """
    function = reference.OPERATORS[name]
    results = operator(*args)
    oracles, eagers = function(*map(upcast, args)), (eager or function)(*args)
    if isinstance(results, Tensor):
        results, oracles, eagers = (results,), (oracles,), (eagers,)
    for result, oracle, other in zip(results, oracles, eagers, strict=True):
        assert result.shape == other.shape
        assert result.dtype == other.dtype
        if not result.numel() or not float(oracle.norm()):
            assert not result.numel() or not float(result.norm())
            continue
        floor = torch.finfo(args[0].dtype).eps / 2
        limit = 2 * (1 + result.numel() ** -0.5) * max(error(other, oracle), floor)
        assert error(result, oracle) <= limit, (name, error(result, oracle), limit)


def eager_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, scale: Tensor | None, activation: str, index: Tensor | None
) -> tuple[Tensor, ...]:
    """Autograd's gradients of transformers' and PEFT's formula: the activation rounds, its product with `up` rounds,
    and the vector multiplies in its own dtype before a last rounding."""
    leaves = [t.detach().clone().requires_grad_() for t in (gate, up, scale) if t is not None]
    hidden = ACTIVATIONS[activation](leaves[0])
    if up is not None:
        hidden = hidden * leaves[1]
    if scale is not None:
        rows = leaves[-1]
        if index is not None:
            rows = torch.cat([rows, rows.new_ones(1, rows.shape[1])])[index.long() % (len(rows) + 1)]
        hidden = (hidden * rows).to(gate.dtype)
    return torch.autograd.grad(hidden, leaves, grad)


def eager_scaled_linear(x: Tensor, weight: Tensor, bias: Any, input_scale: Any, output_scale: Any) -> Tensor:
    """PEFT's formula: the vectors multiply in fp32, with a rounding to the input's dtype on either side."""
    if input_scale is not None:
        x = (x * input_scale).to(x.dtype)
    y = F.linear(x, weight, bias)
    return y if output_scale is None else (y * output_scale).to(y.dtype)
