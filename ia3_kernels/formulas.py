"""The operators as plain torch, for what traces them: torch.compile and torch.export.

A compiler fuses these lines with whatever stands around them, which an operator that it cannot look into would prevent;
and what is exported runs where this package is not installed. The arithmetic is the reference's: fp32, and one rounding
behind the matmul's own.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import reference, target


def _opaque_matmuls() -> frozenset[torch.dtype]:
    """Return the dtypes in which the native library's matmul beats the one that a compiler would call, on this CPU."""
    library = target.native_library()
    if not isinstance(library, ModuleType):
        return frozenset()
    try:
        return frozenset(dtype for dtype in (torch.bfloat16, torch.float16) if library.matmul_route(dtype) == "widen")
    except RuntimeError:  # a word in the environment that means nothing, as every computation says
        return frozenset()


_OPAQUE_MATMULS = _opaque_matmuls()


def applies(op: str, x: Tensor) -> bool:
    """Return whether a trace of ``op`` on ``x`` is to see its formula, rather than the operator."""
    if torch.compiler.is_exporting() or x.device.type != "cpu":
        return True
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return op != "scaled_linear" or dtype not in _OPAQUE_MATMULS


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an operand of a matmul as autocast does, which leaves fp64 alone."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    adapter_index: Tensor | None,
) -> Tensor:
    """Trace ``((x ∘ s_in) Wᵀ + b) ∘ s_out``."""
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype)
    return reference.scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)


gated_activation = reference.gated_activation
scaled_activation = reference.scaled_activation
