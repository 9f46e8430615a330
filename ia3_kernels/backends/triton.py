"""The Triton kernels as a backend, for NVIDIA and AMD GPUs; under Triton's interpreter, for CPU tensors too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import matmul, target
from . import activations
from .base import Backend


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; make that the one of the first tensor."""

    @functools.wraps(function)
    def launch(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return launch


def _operators() -> Mapping[str, Callable[..., object]]:
    if target.triton_problem() is not None:
        return {}
    from ..triton import activation, weight

    functions: dict[str, Callable[..., Any]] = {
        "scaled_linear": functools.partial(matmul.scaled_linear, activation.forward),
        "scale_weight_": weight.scale_weight_,
        **activations.operators(activation.forward, activation.backward),
    }
    return {op: _on_its_device(function) for op, function in functions.items()}


def _detail(op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None) -> str:
    return matmul.describe(device, dtype, shape) if op == "scaled_linear" else ""


BACKEND = Backend(
    name="triton",
    description="Triton kernels, interpreted on the CPU" if target.is_interpreted() else "Triton kernels for GPUs",
    device_types=frozenset({"cuda", "cpu"} if target.is_interpreted() else {"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    operators=_operators(),
    unavailable=target.triton_problem,
    detail=_detail,
)
