"""The operators as transformers and PEFT run them: one torch call after another, each with its own rounding.

Scales are fp32 whatever the activations are, so every product with one goes through fp32 and back. The same formulas on
fp64 tensors, where nothing is rounded in between, are the oracle of the suite `accuracy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: torch.square(F.relu(x)),
    "identity": lambda x: x,
}


def _scale_input(x: Tensor, scale: Tensor) -> Tensor:
    return (x.to(scale.dtype) * scale).to(x.dtype)


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> Tensor:
    """`((x ∘ s_in) Wᵀ + b) ∘ s_out`, as an adapted layer runs it; shapes as in `ia3_kernels.scaled_linear`."""
    y = F.linear(x if input_scale is None else _scale_input(x, input_scale), weight, bias)
    return y if output_scale is None else (y * output_scale).to(y.dtype)


def gated_activation(gate: Tensor, up: Tensor, scale: Tensor, activation: str = "silu") -> Tensor:
    """`act(g) ∘ u`, as a gated MLP computes it, then `∘ s`, as the adapted down projection does."""
    return _scale_input(ACTIVATIONS[activation](gate) * up, scale)


def scaled_activation(x: Tensor, scale: Tensor, activation: str = "silu") -> Tensor:
    """`act(x)`, as a plain MLP computes it, then `∘ s`, as the adapted second layer does."""
    return _scale_input(ACTIVATIONS[activation](x), scale)


def scaled_weight(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
    """`diag(s) W` (dim 0) or `W diag(s)` (dim 1) as a merge computes it: a new tensor, by way of an fp32 one."""
    return torch.mul(weight, scale.unsqueeze(1 - dim)).to(weight.dtype)
