"""The compiled CPU kernels of ``csrc/`` as a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import target
from ..schemas import SCHEMAS
from .base import Backend

_library = target.native_library()


def _unavailable() -> str | None:
    if isinstance(_library, ModuleType):
        return None
    return (
        f"the native library is not built ({_library}); "
        "reinstall with a C++ compiler, and without IA3_SKIP_NATIVE, to build it."
    )


def _operators() -> Mapping[str, Callable[..., object]]:
    if not isinstance(_library, ModuleType):
        return {}
    return {op: getattr(_library, op) for op in SCHEMAS}


def _recovers_product(x: Tensor, weight: Tensor, output_scale: Tensor) -> bool:
    return isinstance(_library, ModuleType) and bool(_library.recovers_product(x, weight, output_scale))


def _detail(op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None) -> str:
    if not isinstance(_library, ModuleType):
        return ""
    detail = f"instruction set {_library.isa()}"
    if op == "scaled_linear" and dtype != torch.float32:
        detail += f", many rows: {_library.matmul_route(dtype)}"
    return detail


BACKEND = Backend(
    name="native",
    description="compiled CPU kernels",
    device_types=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    operators=_operators(),
    unavailable=_unavailable,
    recovers_product=_recovers_product,
    detail=_detail,
)
