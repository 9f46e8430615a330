"""Errors against fp64: of our operators and of the eager formulas, outputs and gradients, on the same inputs.

An error is relative, in the L2 norm, with the errors of several draws taken together. The record's ratio is ours over
eager's; there is no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import ia3_kernels

from .. import eager
from ..records import Recorder
from ..settings import DTYPES, Settings

_Tensors = dict[str, Tensor]
_Formula = Callable[..., Tensor]


@dataclass(frozen=True)
class _Case:
    """Two ways to compute one thing from tensors of these shapes; a name that ends in `scale` is a vector near one."""

    name: str
    ours: _Formula
    eager: _Formula
    shapes: Mapping[str, tuple[int, ...]]
    zeros: bool = False  # whether the scales have entries of zero, which leaves nothing to divide by
    differentiable: bool = True


def _cases(rows: int, wide: int, narrow: int) -> Iterator[_Case]:
    linear = {"x": (rows, wide), "weight": (narrow, wide), "bias": (narrow,)}
    for side, size in (("input", wide), ("output", narrow)):
        for zeros in (False, True):
            yield _Case(
                f"scaled_linear, {side} side" + (", zeros in the scale" if zeros else ""),
                ia3_kernels.scaled_linear,
                eager.scaled_linear,
                {**linear, f"{side}_scale": (size,)},
                zeros,
            )
    for activation in ia3_kernels.ACTIVATIONS:
        yield _Case(
            f"gated_activation, {activation}",
            _with_activation(ia3_kernels.gated_activation, activation),
            _with_activation(eager.gated_activation, activation),
            {"gate": (rows, wide), "up": (rows, wide), "scale": (wide,)},
        )
        yield _Case(
            f"scaled_activation, {activation}",
            _with_activation(ia3_kernels.scaled_activation, activation),
            _with_activation(eager.scaled_activation, activation),
            {"x": (rows, wide), "scale": (wide,)},
        )
    for dim, size in enumerate((narrow, wide)):
        yield _Case(
            f"scale_weight_, dim {dim}",
            _with_dim(lambda weight, scale, dim: ia3_kernels.scale_weight_(weight.clone(), scale, dim), dim),
            _with_dim(eager.scaled_weight, dim),
            {"weight": (narrow, wide), "scale": (size,)},
            differentiable=False,
        )


def _with_activation(formula: _Formula, activation: str) -> _Formula:
    return lambda **tensors: formula(**tensors, activation=activation)


def _with_dim(formula: _Formula, dim: int) -> _Formula:
    return lambda **tensors: formula(**tensors, dim=dim)


def _draw(case: _Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> _Tensors:
    tensors: _Tensors = {}
    for name, shape in case.shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("scale"):
            values = 1 + 0.2 * values
            if case.zeros:
                values[::7] = 0
            tensors[name] = values.to(device)  # vectors stay fp32
        else:
            tensors[name] = (values / (shape[-1] ** 0.5 if name == "weight" else 1)).to(device, dtype)
    return tensors


def _evaluate(case: _Case, formula: _Formula, tensors: _Tensors, output_grad: Tensor) -> _Tensors:
    """The output and, where the case has them, the gradients of all inputs, in fp64."""
    leaves = {name: tensor.clone().requires_grad_(case.differentiable) for name, tensor in tensors.items()}
    output = formula(**leaves)
    results = {"output": output}
    if case.differentiable:
        gradients = torch.autograd.grad(output, list(leaves.values()), output_grad.to(output.dtype))
        results.update({f"gradient of {name}": grad for name, grad in zip(leaves, gradients, strict=True)})
    return {name: result.detach().double() for name, result in results.items()}


def _errors(case: _Case, dtype: torch.dtype, device: torch.device, draws: int) -> dict[str, tuple[float, float]]:
    """Squared errors of ours and of eager's by quantity, each summed over draws, relative to the oracle's norm."""
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, tuple[float, float]] = {}
    for _ in range(draws):
        tensors = _draw(case, dtype, device, generator)
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        with torch.no_grad():
            shape = case.eager(**exact).shape
        output_grad = torch.randn(shape, generator=generator).to(device, dtype)
        oracle = _evaluate(case, case.eager, exact, output_grad)
        ours, theirs = (_evaluate(case, formula, tensors, output_grad) for formula in (case.ours, case.eager))
        for name, expected in oracle.items():
            scale = float(expected.square().sum())
            previous = errors.get(name, (0.0, 0.0))
            errors[name] = (
                previous[0] + float((ours[name] - expected).square().sum()) / scale,
                previous[1] + float((theirs[name] - expected).square().sum()) / scale,
            )
    return errors


def _ratio(ours: float, theirs: float) -> float:
    """The ratio of the errors from their squares; 1 where both are exact."""
    return 1.0 if ours == theirs else (ours / theirs) ** 0.5 if theirs else float("inf")


def run(settings: Settings, recorder: Recorder) -> None:
    """Compares every operator, every activation and every gradient, in the run's dtypes and fp16 besides."""
    rows, wide, narrow = (16, 64, 32) if settings.quick else (256, 1024, 256)
    draws = 2 if settings.quick else 16  # at 16, fp32's smallest errors still leave 1 % of chance in the ratio
    for dtype in dict.fromkeys((*settings.dtypes, "fp16")):
        for case in _cases(rows, wide, narrow):
            for quantity, (ours, theirs) in _errors(case, DTYPES[dtype], settings.device, draws).items():
                name = f"{case.name}: {quantity}"
                recorder.add("accuracy", name, dtype, "ours", ratios={"eager": _ratio(ours, theirs)})
