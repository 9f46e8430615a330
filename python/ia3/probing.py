"""What a class computes, tried on numbers: names alone cannot tell a product from a sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def numbers(*shape: int, shift: int = 0) -> Tensor:
    """Return fp64 numbers between -1 and 1 in this shape, the same ones each time."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64, device="cpu") + shift).view(shape)


def what_linear_computes(layer: nn.Linear) -> str | None:
    """Return what the class's ``forward`` of an ``nn.Linear`` or a subclass computes.

    ``linear``: ``x Wᵀ + b``; ``features``: something else of that shape; ``other``: anything else (a router's tuple).
    ``None`` where it cannot be told: the class wants more than a weight and a bias (quantized layers do).
    """
    kind = type(layer)
    if kind.forward is nn.Linear.forward:
        return "linear"
    if type(layer._parameters.get("weight")) is not nn.Parameter:
        return None
    return _try_linear(kind, layer)


def _try_linear(kind: Any, layer: nn.Linear) -> str | None:
    inputs, outputs = 5, 12
    clone = kind.__new__(kind)
    nn.Module.__init__(clone)
    own = {name: value for name, value in vars(layer).items() if name not in vars(clone) and name != "forward"}
    clone.__dict__.update(own, in_features=inputs, out_features=outputs, training=False)
    weight, x = numbers(outputs, inputs), numbers(2, inputs, shift=70)
    bias = None if layer._parameters.get("bias") is None else numbers(outputs, shift=140)
    clone._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    clone._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    try:
        with torch.no_grad():
            y = kind.forward(clone, x)
    except Exception:  # it needs what this clone lacks
        return None
    expected = F.linear(x, weight, bias)
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return "other"
    return "linear" if torch.allclose(y.to(expected), expected) else "features"
