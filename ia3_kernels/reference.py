"""Every operator in plain torch: the oracle that tests hold backends to, and the fallback where no kernel applies.

Arithmetic is in fp32 (fp64 for fp64 inputs) with one rounding at the end, except that a matmul rounds its own result to
the input's dtype, as ``torch.nn.functional.linear`` does. Shapes and errors are those of ``schemas``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import exact_reference
from .schemas import check_activation, check_bounds, check_scale_weight_, check_scaled_linear, index_of

# --- activations and their derivatives ---------------------------------------------------------------------------

# name -> (act(x), dy ∘ act'(x) from dy and x)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
    "relu": (F.relu, lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0)),
    "relu2": (lambda x: F.relu(x).square(), lambda dy, x: dy * 2 * F.relu(x)),
    "identity": (lambda x: x, lambda dy, x: dy),
}


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by its name."""
    return _ACTIVATIONS[activation][0](x)


# --- helpers -----------------------------------------------------------------------------------------------------


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        return _sum_by_adapter(flat(grad), adapter_index, ctx.adapters), None


def _rows_of_scale(scale: Tensor, adapter_index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the scale as it multiplies the rows: ``[n]``, or gathered to ``[*, n]`` with ones for no adapter."""
    scale, adapter_index = scale.to(dtype), index_of(scale, adapter_index)
    if adapter_index is None:
        return scale.reshape(-1)
    # An async assert cannot be a sentence, so the bounds are only read on the host where that costs no synchronization.
    if not torch.compiler.is_compiling():
        check_bounds(adapter_index, scale.shape[0])
    rows: Tensor = _Gather.apply(scale, adapter_index)
    return rows


def _sum_by_adapter(rows: Tensor, adapter_index: Tensor, adapters: int) -> Tensor:
    """Sum rows ``[rows, n]`` to ``[A, n]``: by a one-hot matmul, without atomics, so the same bits in every run."""
    chosen = adapter_index.reshape(-1, 1) == torch.arange(adapters, device=rows.device, dtype=torch.int32)
    return chosen.to(rows.dtype).t() @ rows


def flat(x: Tensor) -> Tensor:
    """Return ``[*, n]`` as ``[rows, n]``, also where n is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _reduce_scale_gradient(product: Tensor, scale: Tensor, adapter_index: Tensor | None) -> Tensor:
    """Sum ``product [*, n]`` over the rows that used each scale; ``[n]`` or ``[A, n]`` in the scale's dtype."""
    rows = flat(product)
    if adapter_index is None:
        return rows.sum(0).to(scale.dtype).view(scale.shape)
    return _sum_by_adapter(rows, adapter_index, scale.shape[0]).to(scale.dtype)


# --- forward -----------------------------------------------------------------------------------------------------


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    check_scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)
    dtype = _compute_dtype(x.dtype)
    # y = ((x ∘ s_in) Wᵀ + b) ∘ s_out
    if input_scale is not None:
        x = (x.to(dtype) * _rows_of_scale(input_scale, adapter_index, dtype)).to(x.dtype)
    y = F.linear(x, weight, bias)
    if output_scale is not None:
        y = (y.to(dtype) * _rows_of_scale(output_scale, adapter_index, dtype)).to(y.dtype)
    return y


def gated_activation(
    gate: Tensor,
    up: Tensor,
    scale: Tensor | None = None,
    activation: str = "silu",
    adapter_index: Tensor | None = None,
) -> Tensor:
    check_activation("gated_activation", gate, up, scale, activation, adapter_index)
    dtype = _compute_dtype(gate.dtype)
    # h = act(g) ∘ u ∘ s
    h = _ACTIVATIONS[activation][0](gate.to(dtype)) * up.to(dtype)
    if scale is not None:
        h = h * _rows_of_scale(scale, adapter_index, dtype)
    return h.to(gate.dtype, memory_format=torch.contiguous_format, copy=True)


def scaled_activation(
    x: Tensor, scale: Tensor | None = None, activation: str = "silu", adapter_index: Tensor | None = None
) -> Tensor:
    check_activation("scaled_activation", x, None, scale, activation, adapter_index)
    dtype = _compute_dtype(x.dtype)
    # h = act(x) ∘ s
    h = _ACTIVATIONS[activation][0](x.to(dtype))
    if scale is not None:
        h = h * _rows_of_scale(scale, adapter_index, dtype)
    # An operator never returns its input, which `identity` without a scale would otherwise do.
    return h.to(x.dtype, memory_format=torch.contiguous_format, copy=True)


def scale_pair(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(x.dtype)
    wide = x.to(dtype)
    # a = x ∘ s_a ; b = x ∘ s_b
    a, b = ((wide * scale.to(dtype).reshape(-1)).to(x.dtype).contiguous() for scale in (first, second))
    return a, b


def scale_weight_(weight: Tensor, scale: Tensor, dim: int) -> None:
    check_scale_weight_(weight, scale, dim)
    dtype = _compute_dtype(weight.dtype)
    # W ← diag(s) W (dim 0) or W diag(s) (dim 1)
    factor = scale.to(dtype).reshape(-1).unsqueeze(1 - dim)
    weight.copy_(weight.to(dtype) * factor)


# --- backward ----------------------------------------------------------------------------------------------------


def gated_activation_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    scale: Tensor | None,
    activation: str,
    adapter_index: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(gate.dtype)
    act, act_backward = _ACTIVATIONS[activation]
    dh, g, u = grad.to(dtype), gate.to(dtype), up.to(dtype)
    wants_gate, wants_up, wants_scale = output_mask
    dhs = dh if scale is None else dh * _rows_of_scale(scale, adapter_index, dtype)
    nothing = gate.new_empty(0)
    # dg = dh ∘ s ∘ u ∘ act'(g) ; du = dh ∘ s ∘ act(g) ; ds = Σ dh ∘ act(g) ∘ u
    grad_gate = act_backward(dhs * u, g).to(gate.dtype) if wants_gate else nothing
    grad_up = (dhs * act(g)).to(up.dtype) if wants_up else nothing
    if wants_scale and scale is not None:
        return grad_gate, grad_up, _reduce_scale_gradient(dh * act(g) * u, scale, adapter_index)
    return grad_gate, grad_up, nothing if scale is None else scale.new_empty(0)


def scaled_activation_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    activation: str,
    adapter_index: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(x.dtype)
    act, act_backward = _ACTIVATIONS[activation]
    dh, x32 = grad.to(dtype), x.to(dtype)
    wants_x, wants_scale = output_mask
    dhs = dh if scale is None else dh * _rows_of_scale(scale, adapter_index, dtype)
    # dx = dh ∘ s ∘ act'(x) ; ds = Σ dh ∘ act(x)
    grad_x = act_backward(dhs, x32).to(x.dtype) if wants_x else x.new_empty(0)
    if wants_scale and scale is not None:
        return grad_x, _reduce_scale_gradient(dh * act(x32), scale, adapter_index)
    return grad_x, x.new_empty(0) if scale is None else scale.new_empty(0)


def scale_pair_backward(
    grad_first: Tensor, grad_second: Tensor, x: Tensor, first: Tensor, second: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(x.dtype)
    da, db = grad_first.to(dtype), grad_second.to(dtype)
    wants_x, wants_first, wants_second = output_mask
    # dx = da ∘ s_a + db ∘ s_b ; ds_a = Σ da ∘ x ; ds_b = Σ db ∘ x
    s_a, s_b = (scale.to(dtype).reshape(-1) for scale in (first, second))
    grad_x = (da * s_a + db * s_b).to(x.dtype) if wants_x else x.new_empty(0)
    wide = x.to(dtype)
    grad_a = _reduce_scale_gradient(da * wide, first, None) if wants_first else first.new_empty(0)
    grad_b = _reduce_scale_gradient(db * wide, second, None) if wants_second else second.new_empty(0)
    return grad_x, grad_a, grad_b


OPERATORS: dict[str, Callable[..., object]] = {
    "scaled_linear": scaled_linear,
    "gated_activation": gated_activation,
    "scaled_activation": scaled_activation,
    "scale_pair": scale_pair,
    "scale_weight_": scale_weight_,
    **exact_reference.OPERATORS,
    "gated_activation_backward": gated_activation_backward,
    "scaled_activation_backward": scaled_activation_backward,
    "scale_pair_backward": scale_pair_backward,
}
