"""The compiled CUDA kernels of ``csrc/cuda`` as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import exact_gpu, matmul, routes, target
from ..moves import Move
from ..schemas import COMPILED
from .base import Backend


def _detail(op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None) -> str:
    if op != "scaled_linear":
        return ""
    return matmul.describe(device, dtype, shape, sorted(routes.available()), is_captured=False)


_UNIT = 256  # of csrc/cuda/exact_scale.cu


def _compiled() -> exact_gpu.Kernel:
    library: Any = target.native_library()  # a module, where this backend can run
    kernel: exact_gpu.Kernel = library.cuda.exact_scale
    return kernel


def _exact_scale(*args: Any) -> None:
    _compiled()(*args)


def _move_all(moves: Sequence[Move], done: list[Any]) -> None:
    # The compiled function itself: an interrupt may come within one that is written in Python.
    exact_gpu.move_all(_compiled(), _UNIT, moves, done)


BACKEND = Backend(
    name="cuda",
    description="compiled CUDA kernels",
    device_types=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    operators=exact_gpu.operators(_exact_scale, _UNIT),
    compiled=frozenset(COMPILED),
    unavailable=target.cuda_problem,
    detail=_detail,
    moves=_move_all,
)
