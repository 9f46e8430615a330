"""The operators as plain torch, for what traces them: torch.compile and torch.export.

A compiler fuses these lines with whatever stands around them, which an operator that it cannot look into would prevent;
and what is exported runs where this package is not installed. The arithmetic is the reference's: fp32, and one rounding
behind the matmul's own.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, target
from .schemas import check_activation, check_scaled_linear, index_of


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


class _Gather(torch.autograd.Function):
    """The scale of each row, ``[A, n]`` -> ``[*, n]``: ones for -1, NaN for an index outside of the matrix.

    Its gradient is a matmul with the rows' choices: the one of an indexed read adds atomically, in any order.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, adapter_index: Tensor) -> Tensor:
        adapters = scale.shape[0]
        ctx.adapters = adapters
        ctx.save_for_backward(adapter_index)
        beside = scale.new_tensor([[1.0], [float("nan")]]).expand(2, scale.shape[1])
        is_known = (adapter_index >= 0) & (adapter_index < adapters)
        unknown = torch.where(adapter_index == -1, adapters, adapters + 1)
        row = torch.where(is_known, adapter_index, unknown).reshape(-1)
        return torch.cat([scale, beside]).index_select(0, row).view(*adapter_index.shape, scale.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (adapter_index,) = ctx.saved_tensors
        numbers = torch.arange(ctx.adapters, device=adapter_index.device, dtype=torch.int32)
        chosen = adapter_index.reshape(-1, 1) == numbers
        return chosen.to(grad.dtype).t() @ grad.flatten(0, -2), None


def _scaled(x: Tensor, scale: Tensor | None, adapter_index: Tensor | None) -> Tensor:
    """Multiply fp32 (fp64) rows ``[*, n]`` by their scales."""
    if scale is None:
        return x
    scale, index = scale.to(x.dtype), index_of(scale, adapter_index)
    return x * (scale.reshape(-1) if index is None else _Gather.apply(scale, index))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
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
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    check_scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)
    if input_scale is not None:
        x = _scaled(_wide(x), input_scale, adapter_index).to(x.dtype)
    y = F.linear(x, weight, bias)
    return y if output_scale is None else _scaled(_wide(y), output_scale, adapter_index).to(y.dtype)


def gated_activation(
    gate: Tensor, up: Tensor, scale: Tensor | None, activation: str, adapter_index: Tensor | None
) -> Tensor:
    """Trace ``act(gate) ∘ up ∘ scale``."""
    check_activation("gated_activation", gate, up, scale, activation, adapter_index)
    h = reference.activate(_wide(gate), activation) * _wide(up)
    return _scaled(h, scale, adapter_index).to(gate.dtype)


def scaled_activation(x: Tensor, scale: Tensor | None, activation: str, adapter_index: Tensor | None) -> Tensor:
    """Trace ``act(x) ∘ scale``."""
    check_activation("scaled_activation", x, None, scale, activation, adapter_index)
    return _scaled(reference.activate(_wide(x), activation), scale, adapter_index).to(x.dtype)
