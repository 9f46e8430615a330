"""The Triton kernels as a backend, for NVIDIA and AMD GPUs; under Triton's interpreter, for CPU tensors too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import exact_gpu, matmul, target
from ..moves import Move
from .base import Backend


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make the first tensor's device the current one, on which Triton launches."""

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
    from ..triton import activation, exact, scale_pair, weight

    def scaled_activation_backward(
        grad: Tensor, x: Tensor, scale: Tensor | None, name: str, index: Tensor | None, mask: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        grad_x, _, grad_scale = activation.backward(grad, x, None, scale, name, index, (mask[0], False, mask[1]))
        return grad_x, grad_scale

    functions: dict[str, Callable[..., Any]] = {
        "scaled_linear": matmul.scaled_linear,
        "gated_activation": activation.forward,
        "scaled_activation": lambda x, *args: activation.forward(x, None, *args),
        "gated_activation_backward": activation.backward,
        "scaled_activation_backward": scaled_activation_backward,
        "scale_weight_": weight.scale_weight_,
        "scale_pair": scale_pair.forward,
        "scale_pair_backward": scale_pair.backward,
        **exact_gpu.operators(exact.exact_scale, exact.UNIT),
    }
    return {op: on_its_device(function) for op, function in functions.items()}


def _detail(op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None) -> str:
    if op != "scaled_linear":
        return ""
    return matmul.describe(device, dtype, shape, ["triton"], is_captured=True)


def _move_all(moves: Sequence[Move], done: list[Any]) -> None:
    from ..triton import exact

    on_its_device(lambda weight: exact_gpu.move_all(exact.exact_scale, exact.UNIT, moves, done))(moves[0].weight)


BACKEND = Backend(
    name="triton",
    description="Triton kernels, interpreted on the CPU" if target.is_interpreted() else "Triton kernels for GPUs",
    device_types=frozenset({"cuda", "cpu"} if target.is_interpreted() else {"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    operators=_operators(),
    unavailable=target.triton_problem,
    detail=_detail,
    moves=_move_all,
)
