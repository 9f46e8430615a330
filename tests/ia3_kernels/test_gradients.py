"""Gradients: finite differences on the fp64 reference, and every dtype against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import ia3_kernels as kernels

from .helpers import DTYPES, eager_scaled_linear, error, upcast


def _doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("zero", [False, True])
def test_scaled_linear_by_finite_differences(zero: bool) -> None:
    x, weight, bias, input_scale, output_scale = _doubles((2, 3, 5), (4, 5), (4,), (5,), (4,))
    if zero:
        with torch.no_grad():
            input_scale[1] = 0
            output_scale[2] = 0
    assert gradcheck(kernels.scaled_linear, (x, weight, bias, input_scale, output_scale))


def test_scaled_linear_with_adapters_by_finite_differences() -> None:
    x, weight, bias, input_scale, output_scale = _doubles((5, 5), (4, 5), (4,), (2, 5), (2, 4))
    index = torch.tensor([0, -1, 1, 1, 0], dtype=torch.int32)
    for s_in, s_out in ((input_scale, output_scale), (input_scale[0], output_scale), (input_scale, output_scale[1])):
        leaves = (x, weight, bias, *(scale.detach().requires_grad_() for scale in (s_in, s_out)))
        assert gradcheck(lambda *args: kernels.scaled_linear(*args, index), leaves)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_activations_by_finite_differences(activation: str) -> None:
    gate, up, scale, scales = _doubles((3, 6), (3, 6), (6,), (2, 6))
    index = torch.tensor([1, -1, 0], dtype=torch.int32)
    assert gradcheck(lambda g, u, s: kernels.gated_activation(g, u, s, activation), (gate, up, scale))
    assert gradcheck(lambda g, u, s: kernels.gated_activation(g, u, s, activation, index), (gate, up, scales))
    assert gradcheck(lambda g, s: kernels.scaled_activation(g, s, activation), (gate, scale))
    assert gradcheck(lambda g, s: kernels.scaled_activation(g, s, activation, index), (gate, scales))
    assert gradcheck(lambda g, u: kernels.gated_activation(g, u, None, activation), (gate, up))


# Ones are where training starts; the others are where a formula that divides by the scale, or leaves fp16, breaks.
_SCALES = {
    "ones": lambda n: torch.ones(n),
    "normal": lambda n: torch.randn(n),
    "negative": lambda n: -torch.rand(n) - 0.5,
    "zeros among them": lambda n: torch.randn(n) * (torch.arange(n) % 3 > 0),
    "all zero": lambda n: torch.zeros(n),
    "huge and tiny": lambda n: torch.randn(n) * 10.0 ** (4 * (torch.arange(n) % 3) - 4).float(),
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 130])
@pytest.mark.parametrize("scales", _SCALES)
def test_scaled_linear_against_the_oracle(dtype: torch.dtype, rows: int, scales: str) -> None:
    inputs, outputs = 48, 40
    x = torch.randn(rows, inputs).to(dtype)
    weight, bias = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), torch.randn(outputs).to(dtype)
    grad = torch.randn(rows, outputs).to(dtype)
    input_scale, output_scale = torch.randn(inputs), _SCALES[scales](outputs)
    if dtype == torch.float16 and scales == "huge and tiny":
        pytest.skip("the scaled values themselves leave fp16's range")

    def gradients(function: object, *args: Tensor) -> tuple[Tensor, ...]:
        leaves = [arg.clone().requires_grad_() for arg in args]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(args[0].dtype))  # type: ignore[operator]

    args = (x, weight, bias, input_scale, output_scale)
    oracles = gradients(eager_scaled_linear, *map(upcast, args))
    eagers = gradients(eager_scaled_linear, *args)
    results = gradients(kernels.scaled_linear, *args)
    for name, result, eager, oracle in zip(
        ("x", "weight", "bias", "input_scale", "output_scale"), results, eagers, oracles, strict=True
    ):
        assert result.dtype == eager.dtype
        if not float(oracle.norm()):
            assert not float(result.norm()), name
            continue
        # Twice the eager formula's error, or of one rounding where that formula happens to be exact.
        limit = 2 * max(error(eager, oracle), torch.finfo(result.dtype).eps)
        assert error(result, oracle) <= limit, (name, error(result, oracle), limit)


@pytest.mark.usefixtures("place")
def test_a_zero_scale_still_learns() -> None:
    # d/ds of (x Wᵀ) ∘ s at s = 0 is x Wᵀ: recovering it from the output, which is zero there, would give NaN or 0.
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    scale = torch.zeros(5, requires_grad=True)
    kernels.scaled_linear(x, weight, None, None, scale).sum().backward()
    torch.testing.assert_close(scale.grad, (x @ weight.t()).sum(0))


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (0, 4), (3, 4)])
def test_scaled_linear_computes_only_what_is_asked(needed: tuple[int, ...]) -> None:
    args = [torch.randn(shape) for shape in ((7, 6), (5, 6), (5,), (6,), (5,))]
    leaves = [arg.clone().requires_grad_(i in needed) for i, arg in enumerate(args)]
    expected = [arg.clone().requires_grad_(i in needed) for i, arg in enumerate(args)]
    kernels.scaled_linear(*leaves).square().sum().backward()
    eager_scaled_linear(*expected).square().sum().backward()
    for i, (leaf, other) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is not None) == (i in needed)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("operator", ["scaled_linear", "gated_activation", "scaled_activation"])
def test_second_derivatives_raise_a_sentence(operator: str) -> None:
    scale = torch.randn(6, requires_grad=True)
    x = torch.randn(3, 6, requires_grad=True)
    y = {
        "scaled_linear": lambda: kernels.scaled_linear(x, torch.randn(4, 6), None, scale),
        "gated_activation": lambda: kernels.gated_activation(x, torch.randn(3, 6), scale),
        "scaled_activation": lambda: kernels.scaled_activation(x, scale),
    }[operator]()
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator}: second-order gradients are not implemented"):
        grad.sum().backward()


def test_gradients_are_the_same_bits_whatever_the_threads() -> None:
    gate, up, dh = (torch.randn(300, 2100).bfloat16() for _ in range(3))
    scale = torch.randn(2100)
    threads = torch.get_num_threads()

    def run() -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (gate, up, scale)]
        return torch.autograd.grad(kernels.gated_activation(*leaves), leaves, dh)

    try:
        runs = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.usefixtures("place")
def test_backward_twice_and_through_views() -> None:
    both = torch.randn(5, 12, requires_grad=True)
    scale = torch.randn(6, requires_grad=True)
    gate, up = both.chunk(2, -1)
    loss = kernels.gated_activation(gate, up, scale).sum()
    loss.backward(retain_graph=True)
    assert both.grad is not None
    first = both.grad.clone()
    loss.backward()
    torch.testing.assert_close(both.grad, 2 * first)
    # A gradient that is an expanded view, as from sum(), or transposed
    y = kernels.gated_activation(gate, up, scale)
    (expanded,) = torch.autograd.grad(y, both, torch.ones(1).expand(5, 6), retain_graph=True)
    (transposed,) = torch.autograd.grad(y, both, torch.ones(6, 5).t())
    torch.testing.assert_close(expanded, transposed)
