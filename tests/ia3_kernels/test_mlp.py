"""Feed-forward blocks as one operator: values and every gradient, for every layout of scales and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

import ia3_kernels as kernels

from .helpers import ACTIVATIONS, DTYPES, error, upcast

H, I = 24, 40  # noqa: E741  (the letters of the docstrings)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else (x * scale).to(x.dtype)


def _gated(x: Tensor, *weights: Tensor, scale: Any, activation: str, gate_scale: Any, up_scale: Any) -> Tensor:
    """As transformers and PEFT run it."""
    gate, up = F.linear(_scaled(x, gate_scale), weights[0]), F.linear(_scaled(x, up_scale), weights[1])
    return F.linear(_scaled(ACTIVATIONS[activation](gate) * up, scale), weights[2])


def _plain(x: Tensor, *weights: Tensor, scale: Any, activation: str, up_bias: Any, down_bias: Any) -> Tensor:
    return F.linear(_scaled(ACTIVATIONS[activation](F.linear(x, weights[0], up_bias)), scale), weights[1], down_bias)


def _weight(rows: int, cols: int, is_transposed: bool, dtype: torch.dtype) -> Tensor:
    """A weight as a linear layer stores it, or as a Conv1D does."""
    stored = torch.randn(*((cols, rows) if is_transposed else (rows, cols))) / cols**0.5
    return (stored.t() if is_transposed else stored).to(dtype)


def _assert_gradients(block: Any, formula: Any, inputs: list[Tensor | None], wanted: list[bool]) -> None:
    """The block's value and gradients err at most twice as much as the formula's, against fp64."""

    def run(function: Any, values: list[Any]) -> list[Tensor]:
        leaves = [
            value.detach().clone().requires_grad_(want) if value is not None else None
            for value, want in zip(values, wanted, strict=True)
        ]
        y = function(*leaves)
        asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
        grad = torch.cos(torch.arange(y.numel(), device=y.device)).reshape(y.shape).to(y.dtype)
        return [y.detach(), *(torch.autograd.grad(y, asked, grad) if asked else ())]

    oracles, eagers = run(formula, [upcast(value) for value in inputs]), run(formula, inputs)
    for result, eager, oracle in zip(run(block, inputs), eagers, oracles, strict=True):
        assert result.dtype == eager.dtype
        assert result.shape == eager.shape
        limit = 2 * max(error(eager, oracle), torch.finfo(eager.dtype).eps, torch.finfo(inputs[0].dtype).eps / 2)  # type: ignore[union-attr]
        assert error(result, oracle) <= limit, (error(result, oracle), limit)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (2, 3), (70,), (0,)])
@pytest.mark.parametrize("layout", ["none", "hidden", "inputs", "inputs and hidden", "one input"])
def test_a_gated_block(dtype: torch.dtype, rows: tuple[int, ...], layout: str) -> None:
    if rows == (0,):  # there is no error to compare
        x = torch.empty(0, H, dtype=dtype, requires_grad=True)
        weights = [torch.randn(shape).to(dtype) for shape in ((I, H), (I, H), (H, I))]
        y = kernels.gated_mlp(x, *weights)
        y.sum().backward()
        assert y.shape == (0, H)
        return
    for is_transposed in (False, True):
        x = torch.randn(*rows, H).to(dtype)
        weights = [_weight(*shape, is_transposed, dtype) for shape in ((I, H), (I, H), (H, I))]
        scale = 1 + torch.randn(I) if "hidden" in layout else None
        gate_scale = 1 + torch.randn(H) if "inputs" in layout else None
        up_scale = 1 + torch.randn(H) if "input" in layout else None

        def block(x: Tensor, s: Any, g: Any, u: Any, weights: list[Tensor] = weights) -> Tensor:
            return kernels.gated_mlp(x, *weights, s, "silu", g, u)

        def formula(x: Tensor, s: Any, g: Any, u: Any, weights: list[Tensor] = weights) -> Tensor:
            cast = [weight.to(x.dtype) for weight in weights]
            return _gated(x, *cast, scale=s, activation="silu", gate_scale=g, up_scale=u)

        inputs = [x, scale, gate_scale, up_scale]
        for needs_x in (True, False):
            _assert_gradients(block, formula, inputs, [needs_x, *(value is not None for value in inputs[1:])])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("has_biases", [False, True])
def test_a_plain_block(activation: str, has_biases: bool) -> None:
    biases = [torch.randn(I), torch.randn(H)] if has_biases else [None, None]
    for is_transposed in (False, True):
        weights = [_weight(I, H, is_transposed, torch.float32), _weight(H, I, is_transposed, torch.float32)]

        def block(x: Tensor, s: Tensor, weights: list[Tensor] = weights) -> Tensor:
            return kernels.mlp(x, *weights, s, activation, *biases)

        def formula(x: Tensor, s: Tensor, weights: list[Tensor] = weights) -> Tensor:
            cast = [weight.to(x.dtype) for weight in weights]
            up_bias, down_bias = (None if bias is None else bias.to(x.dtype) for bias in biases)
            return _plain(x, *cast, scale=s, activation=activation, up_bias=up_bias, down_bias=down_bias)

        for wanted in ([True, True], [True, False], [False, True]):
            _assert_gradients(block, formula, [torch.randn(2, 9, H), torch.randn(I)], wanted)


@pytest.mark.usefixtures("place")
def test_weights_that_are_trained_get_their_gradients() -> None:
    x, scale = torch.randn(7, H), torch.randn(I)
    weights = [_weight(*shape, False, torch.float32) for shape in ((I, H), (I, H), (H, I))]
    leaves = [t.clone().requires_grad_() for t in (x, *weights, scale)]
    results = torch.autograd.grad(kernels.gated_mlp(*leaves).square().sum(), leaves)
    formula = _gated(*leaves[:4], scale=leaves[4], activation="silu", gate_scale=None, up_scale=None)
    for result, expected in zip(results, torch.autograd.grad(formula.square().sum(), leaves), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    up_bias = torch.randn(I, requires_grad=True)
    kernels.mlp(x, weights[0], weights[2], None, "gelu", up_bias).sum().backward()
    assert up_bias.grad is not None


def test_blocks_by_finite_differences() -> None:
    def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((5, 4), (5, 4), (3, 5))]
    x, scale, gate_scale, up_scale = doubles((2, 3, 4), (5,), (4,), (4,))
    assert gradcheck(lambda x, s: kernels.gated_mlp(x, *weights, s, "gelu"), (x, scale))
    assert gradcheck(
        lambda x, s, g, u: kernels.gated_mlp(x, *weights, s, "silu", g, u), (x, scale, gate_scale, up_scale)
    )
    assert gradcheck(lambda x, s: kernels.mlp(x, weights[0], weights[2], s, "gelu_tanh"), (x, scale))


@pytest.mark.usefixtures("place")
def test_a_block_is_deterministic_and_refuses_second_derivatives() -> None:
    x = torch.randn(130, H).bfloat16().requires_grad_()
    scale = torch.randn(I, requires_grad=True)
    weights = [torch.randn(shape).bfloat16() for shape in ((I, H), (I, H), (H, I))]
    runs = [torch.autograd.grad(kernels.gated_mlp(x, *weights, scale).float().sum(), (x, scale)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    (grad,) = torch.autograd.grad(kernels.gated_mlp(x, *weights, scale).float().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"\w+: second-order gradients are not implemented"):
        grad.float().sum().backward()


def test_autocast_casts_the_matmuls_of_a_block() -> None:
    x, scale = torch.randn(5, H, requires_grad=True), torch.randn(I, requires_grad=True)
    weights = [torch.randn(shape) for shape in ((I, H), (I, H), (H, I))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = kernels.gated_mlp(x, *weights, scale), kernels.mlp(x, weights[0], weights[2], scale)
    assert y.dtype == z.dtype == torch.bfloat16
    (y.sum() + z.sum()).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    cast = kernels.gated_mlp(x.bfloat16(), *(weight.bfloat16() for weight in weights), scale)
    assert torch.equal(y, cast)
