"""The compiled CPU kernels of ``csrc/`` as a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch

from .. import target
from ..schemas import COMPILED, EXACT
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
    return {op: getattr(_library, op) for op in EXACT}


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
    compiled=frozenset(COMPILED),
    unavailable=_unavailable,
    detail=_detail,
)
