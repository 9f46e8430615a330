"""The compiled CUDA kernels of ``csrc/`` as a backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from .. import cuda, matmul, target
from . import activations
from .base import Backend


def _operators() -> Mapping[str, Callable[..., object]]:
    return {
        "scaled_linear": functools.partial(matmul.scaled_linear, cuda.forward),
        "scale_weight_": cuda.scale_weight_,
        **activations.operators(cuda.forward, cuda.backward),
    }


def _detail(op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None) -> str:
    return matmul.describe(device, dtype, shape) if op == "scaled_linear" else ""


BACKEND = Backend(
    name="cuda",
    description="compiled CUDA kernels",
    device_types=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    operators=_operators(),
    unavailable=target.cuda_problem,
    detail=_detail,
)
