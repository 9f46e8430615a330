"""The operators under pytest-benchmark (`make bench`): forward and backward, beside the formula that PEFT runs.

For watching one operator while working on it. Groups are not interleaved: for numbers to report, use `python -m bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3_kernels

from . import eager
from .settings import DTYPES

_ROWS, _WIDE, _NARROW = 1024, 4096, 1024
_Formula = Callable[..., Tensor]

# operator -> (ours, eager, the names and shapes of its tensors)
_OPERATORS: dict[str, tuple[_Formula, _Formula, dict[str, tuple[int, ...]]]] = {
    "scaled_linear (output)": (
        ia3_kernels.scaled_linear,
        eager.scaled_linear,
        {"x": (_ROWS, _NARROW), "weight": (_NARROW, _NARROW), "output_scale": (_NARROW,)},
    ),
    "scaled_linear (input)": (
        ia3_kernels.scaled_linear,
        eager.scaled_linear,
        {"x": (_ROWS, _WIDE), "weight": (_NARROW, _WIDE), "input_scale": (_WIDE,)},
    ),
    "scaled_linear (1 row)": (
        ia3_kernels.scaled_linear,
        eager.scaled_linear,
        {"x": (1, _WIDE), "weight": (_NARROW, _WIDE), "input_scale": (_WIDE,)},
    ),
    "gated_activation": (
        ia3_kernels.gated_activation,
        eager.gated_activation,
        {"gate": (_ROWS, _WIDE), "up": (_ROWS, _WIDE), "scale": (_WIDE,)},
    ),
    "scaled_activation": (
        ia3_kernels.scaled_activation,
        eager.scaled_activation,
        {"x": (_ROWS, _WIDE), "scale": (_WIDE,)},
    ),
}


def _tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape)
        tensors[name] = 1 + 0.2 * values if name.endswith("scale") else values.to(dtype)
    return tensors


@pytest.mark.parametrize("impl", ["ours", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", _OPERATORS)
def test_forward(benchmark: Any, op: str, dtype: str, impl: str) -> None:
    ours, theirs, shapes = _OPERATORS[op]
    benchmark.group = f"{op} forward {dtype}"
    with torch.no_grad():
        benchmark(partial(ours if impl == "ours" else theirs, **_tensors(shapes, DTYPES[dtype])))


@pytest.mark.parametrize("impl", ["ours", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", _OPERATORS)
def test_backward(benchmark: Any, op: str, dtype: str, impl: str) -> None:
    ours, theirs, shapes = _OPERATORS[op]
    benchmark.group = f"{op} backward {dtype}"
    # The weight stays frozen, as in training.
    tensors = {
        name: tensor.requires_grad_(name != "weight") for name, tensor in _tensors(shapes, DTYPES[dtype]).items()
    }
    output = (ours if impl == "ours" else theirs)(**tensors)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    benchmark(partial(torch.autograd.grad, output, leaves, torch.ones_like(output), retain_graph=True))


@pytest.mark.parametrize("impl", ["ours", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dim", [0, 1])
def test_scale_weight(benchmark: Any, dim: int, dtype: str, impl: str) -> None:
    benchmark.group = f"scale_weight_ dim {dim} {dtype}"
    scale = ia3_kernels.scale_weight_ if impl == "ours" else eager.scaled_weight
    weight = torch.randn(_WIDE, _WIDE).to(DTYPES[dtype])
    benchmark(partial(scale, weight, -torch.ones(_WIDE), dim))
