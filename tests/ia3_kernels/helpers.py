"""Shared by the operator tests: the oracle, its error measure, and the shapes that break kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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


# Elements over which an error is taken as the formula's and not as a sample of it: its spread is then 1 / √64.
SAMPLE = 64


def assert_accurate(
    operator: Callable[..., Any], name: str, *args: Any, eager: Callable[..., Any] | None = None, terms: int = 1
) -> None:
    """`operator`'s error against the fp64 oracle is at most twice the eager formula's in the same dtype.

    The eager formula errs by chance as well; half an ulp of the input's dtype, where a rounding to it is unavoidable,
    is the floor below which neither can go. Over n elements either error is a sample, which spreads by 1 / √n: ours is
    allowed that much more, and the formula's is taken over `SAMPLE` elements at least. A single product of a sum
    that cancels may be off by nothing in one order of summation, and by many ulps in the other.

    terms: products that are added up in fp32 in any order. One after the other, their partial sums grow as a random
    walk's steps do, and their roundings come to 0.41 √terms half ulps; a formula that adds up in a tree errs less.
    """
    function = reference.OPERATORS[name]
    eager = eager or function
    results, oracles, eagers = map(_several, (operator(*args), function(*map(upcast, args)), eager(*args)))
    typical = eager_errors(function, eager, args, oracles, eagers)
    for result, oracle, like, other in zip(results, oracles, eagers, typical, strict=True):
        assert result.shape == like.shape
        assert result.dtype == like.dtype
        if not result.numel() or not float(oracle.norm()):
            assert not result.numel() or not float(result.norm())
            continue
        floor = torch.finfo(args[0].dtype).eps / 2
        if args[0].dtype == torch.float32:
            floor *= max(1, 0.41 * terms**0.5)
        limit = 2 * (1 + result.numel() ** -0.5) * max(other, floor)
        assert error(result, oracle) <= limit, (name, error(result, oracle), limit)


def eager_errors(
    function: Callable[..., Any],
    eager: Callable[..., Any],
    args: tuple[Any, ...],
    oracles: tuple[Tensor, ...],
    eagers: tuple[Tensor, ...],
) -> list[float]:
    """The eager formula's relative error in each result: the root of the mean square over enough draws.

    Where a result has fewer than `SAMPLE` elements, the formula is evaluated again on arguments that differ by up to a
    thousandth: as well or badly conditioned as the given ones, and rounded anew everywhere.
    """
    fewest = min((oracle.numel() for oracle in oracles if oracle.numel()), default=SAMPLE)
    draws = -(-SAMPLE // fewest)
    pairs = [(eagers, oracles)]
    # A generator of its own, so that what a test draws next does not depend on it
    generator = torch.Generator(args[0].device).manual_seed(0)
    for _ in range(1, draws):
        drawn = [_moved(value, generator) for value in args]
        pairs.append((_several(eager(*drawn)), _several(function(*map(upcast, drawn)))))
    return [
        sum(error(found[place], exact[place]) ** 2 / draws for found, exact in pairs) ** 0.5
        for place in range(len(oracles))
    ]


def _several(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _moved(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    noise = torch.rand(value.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return (value * (1 + 2e-3 * (noise - 0.5))).to(value.dtype)


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


def interrupted(function: Callable[[], Any], after: int, files: Sequence[str | None]) -> bool:
    """Call `function`, and raise KeyboardInterrupt before the instruction that follows `after` others of these files.

    Between any two of them Python may run a signal's handler. Returns whether there were so many.
    """

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal after
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            after -= 1
            if after < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False
