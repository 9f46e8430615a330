"""Fused kernels for (IA)³: learned vectors that rescale a frozen transformer's activations.

Six operators, each differentiable, traceable by ``torch.compile`` and also registered as ``torch.ops.ia3.*``. Shapes:
``K`` = in_features, ``N`` = out_features, ``H`` = hidden size, ``I`` = intermediate size, ``A`` = adapters, ``*`` = any
batch shape. Scales are vectors ``[n]`` (also ``[n, 1]`` and ``[1, n]``, as PEFT stores them), or ``[A, n]`` matrices
together with an int32 ``adapter_index`` of shape ``[*]`` that picks a row for every position (``-1``: no scaling).
Arithmetic on scales is fp32, with one rounding at the end.

Beside them, ``merge_``, ``unmerge_`` and ``swap_`` merge a scale into a weight in place and undo that bit-exactly.

Source of the method: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", 2022, arXiv 2205.05638.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import autograd as _autograd  # registers the gradients where there is no native library
from . import backends, formulas, reference, target
from .backends import Choice, explain
from .exact import Residual, merge_, stays_finite, swap_, unmerge_
from .schemas import ACTIVATIONS, block_error, check_given, check_out

del _autograd

__all__ = [
    "ACTIVATIONS",
    "Choice",
    "Residual",
    "backends",
    "explain",
    "gated_activation",
    "gated_mlp",
    "merge_",
    "mlp",
    "reference",
    "scale_weight_",
    "scaled_activation",
    "scaled_linear",
    "stays_finite",
    "swap_",
    "target",
    "unmerge_",
]

_ops: Any = torch.ops.ia3
_library = target.native_library()
# The native library's way into the operators: torch.ops' without its costs. It answers None for what only torch.ops can
# do (tensor subclasses, torch function modes), so that calling it first is always right.
_fast = _library.fast if isinstance(_library, ModuleType) else None


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """Compute a linear layer with learned vectors: ``((x ∘ input_scale) @ weight.T + bias) ∘ output_scale``.

    Args:
        x: ``[*, K]``, fp32, bf16, fp16 (fp64 in the reference).
        weight: ``[N, K]`` of x's dtype, any strides. A layer that stores ``[K, N]`` passes its transpose, uncopied.
        bias: ``[N]`` of x's dtype, or None.
        input_scale: ``[K]`` or ``[A, K]``, any floating dtype, or None.
        output_scale: ``[N]`` or ``[A, N]``, any floating dtype, or None. It scales the bias too.
        adapter_index: ``[*]`` int32 where a scale is two-dimensional, else None. It picks that scale's rows; a vector
            beside it scales every row of x.

    Returns:
        ``[*, N]`` of x's dtype, contiguous.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
        IndexError: an adapter index is outside ``-1 .. A-1``.
    """
    if torch.compiler.is_compiling():
        if formulas.applies("scaled_linear", x):
            return formulas.scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)
    elif _fast is not None:
        y: Tensor | None = _fast.scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)
        if y is not None:
            return y
    return _ops.scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)  # type: ignore[no-any-return]


def gated_activation(
    gate: Tensor,
    up: Tensor,
    scale: Tensor | None = None,
    activation: str = "silu",
    adapter_index: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute the hidden state of a gated MLP, scaled for the down projection: ``act(gate) ∘ up ∘ scale``.

    Args:
        gate, up: ``[*, I]``, same shape and dtype (fp32, bf16, fp16; fp64 in the reference). Rows may be strided.
        scale: ``[I]`` or ``[A, I]``, any floating dtype, or None.
        activation: one of ``ACTIVATIONS``; ``gelu`` is the exact erf form, ``gelu_tanh`` its tanh approximation, and
            ``relu2`` the squared ReLU.
        adapter_index: ``[*]`` int32 with a two-dimensional scale, else None.
        out: a contiguous tensor of the result's shape and dtype that is written and returned, where no gradient is
            asked for.

    Returns:
        ``[*, I]`` of gate's dtype, contiguous. Backward keeps gate and up alone.

    Raises:
        RuntimeError: a shape, dtype, device or activation does not fit; the message names the argument.
        IndexError: an adapter index is outside ``-1 .. A-1``.
    """
    if out is not None:
        check_given("gated_activation", "up", up)
        return _activation_into(out, gate, up, scale, activation, adapter_index)
    if torch.compiler.is_compiling():
        if formulas.applies("gated_activation", gate):
            return formulas.gated_activation(gate, up, scale, activation, adapter_index)
    elif _fast is not None:
        h: Tensor | None = _fast.gated_activation(gate, up, scale, activation, adapter_index)
        if h is not None:
            return h
    return _ops.gated_activation(gate, up, scale, activation, adapter_index)  # type: ignore[no-any-return]


def scaled_activation(
    x: Tensor,
    scale: Tensor | None = None,
    activation: str = "silu",
    adapter_index: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute the hidden state of a plain MLP, scaled for the second layer: ``act(x) ∘ scale``.

    Args:
        x: ``[*, I]``, fp32, bf16, fp16 (fp64 in the reference). Rows may be strided.
        scale: ``[I]`` or ``[A, I]``, any floating dtype, or None.
        activation: one of ``ACTIVATIONS``.
        adapter_index: ``[*]`` int32 with a two-dimensional scale, else None.
        out: a contiguous tensor of the result's shape and dtype that is written and returned, where no gradient is
            asked for.

    Returns:
        ``[*, I]`` of x's dtype, contiguous, never x itself. Backward keeps x alone.

    Raises:
        RuntimeError: a shape, dtype, device or activation does not fit; the message names the argument.
        IndexError: an adapter index is outside ``-1 .. A-1``.
    """
    if out is not None:
        return _activation_into(out, x, None, scale, activation, adapter_index)
    if torch.compiler.is_compiling():
        if formulas.applies("scaled_activation", x):
            return formulas.scaled_activation(x, scale, activation, adapter_index)
    elif _fast is not None:
        h: Tensor | None = _fast.scaled_activation(x, scale, activation, adapter_index)
        if h is not None:
            return h
    return _ops.scaled_activation(x, scale, activation, adapter_index)  # type: ignore[no-any-return]


def scale_weight_(weight: Tensor, scale: Tensor, dim: int = 0) -> Tensor:
    """Scale a weight in place, its rows (``dim=0``: ``diag(scale) W``) or its columns (``dim=1``: ``W diag(scale)``).

    Args:
        weight: ``[N, K]``, fp32, bf16, fp16 (fp64 in the reference), any strides; written in place.
        scale: ``[N]`` for ``dim=0``, ``[K]`` for ``dim=1``, any floating dtype, in memory of its own.
        dim: 0 or 1.

    Returns:
        `weight`, for chaining.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or a gradient would have to flow through the write.
    """
    if torch.compiler.is_compiling() or _fast is None or _fast.scale_weight_(weight, scale, dim) is None:
        _ops.scale_weight_(weight, scale, dim)
    return weight


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    scale: Tensor | None = None,
    activation: str = "silu",
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    """Compute a gated feed-forward block: ``(act((x ∘ s_g) @ Wg.T) ∘ ((x ∘ s_u) @ Wu.T) ∘ scale) @ Wd.T``.

    One autograd node, for frozen weights: the second matmul sums the gradient with respect to x, and no kernel behind
    it. Weights that require gradients get them, from the operators of which the block is made.

    Args:
        x: ``[*, H]``, fp32, bf16, fp16 (fp64 in the reference).
        gate_weight, up_weight: ``[I, H]`` of x's dtype, any strides.
        down_weight: ``[N, I]`` of x's dtype, any strides.
        scale: ``[I]``, any floating dtype, or None.
        activation: one of ``ACTIVATIONS``.
        gate_scale, up_scale: ``[H]``, any floating dtype, or None: what x is multiplied by for gate and for up.

    Returns:
        ``[*, N]`` of x's dtype, contiguous. Backward keeps gate and up, and with scales of the inputs x.

    Raises:
        RuntimeError: a shape, dtype, device or activation does not fit; the message names the argument.
    """
    if torch.compiler.is_compiling():
        gate = scaled_linear(x, gate_weight, None, gate_scale)
        up = scaled_linear(x, up_weight, None, up_scale)
        return scaled_linear(gated_activation(gate, up, scale, activation), down_weight)
    arguments = x, gate_weight, up_weight, down_weight, scale, activation, gate_scale, up_scale
    try:
        y = None if _fast is None else _fast.gated_mlp(*arguments)
        result: Tensor = _ops.gated_mlp(*arguments) if y is None else y
        return result
    except RuntimeError as error:
        layers = {
            "up_weight": (up_weight, "IH"),
            "gate_weight": (gate_weight, "IH"),
            "down_weight": (down_weight, "NI"),
        }
        scales = {"scale": (scale, "I"), "gate_scale": (gate_scale, "H"), "up_scale": (up_scale, "H")}
        raise block_error(error, "gated_mlp", x, layers, scales) from None


def mlp(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    scale: Tensor | None = None,
    activation: str = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Compute a plain feed-forward block: ``(act(x @ Wu.T + up_bias) ∘ scale) @ Wd.T + down_bias``.

    One autograd node, for frozen weights and biases; those that require gradients get them.

    Args:
        x: ``[*, H]``, fp32, bf16, fp16 (fp64 in the reference).
        up_weight: ``[I, H]`` of x's dtype, any strides; up_bias: ``[I]`` or None.
        down_weight: ``[N, I]`` of x's dtype, any strides; down_bias: ``[N]`` or None.
        scale: ``[I]``, any floating dtype, or None.
        activation: one of ``ACTIVATIONS``.

    Returns:
        ``[*, N]`` of x's dtype, contiguous. Backward keeps the activation's input alone.

    Raises:
        RuntimeError: a shape, dtype, device or activation does not fit; the message names the argument.
    """
    if torch.compiler.is_compiling():
        hidden = scaled_activation(scaled_linear(x, up_weight, up_bias), scale, activation)
        return scaled_linear(hidden, down_weight, down_bias)
    arguments = x, up_weight, down_weight, scale, activation, up_bias, down_bias
    try:
        y = None if _fast is None else _fast.mlp(*arguments)
        result: Tensor = _ops.mlp(*arguments) if y is None else y
        return result
    except RuntimeError as error:
        layers = {
            "up_weight": (up_weight, "IH"),
            "down_weight": (down_weight, "NI"),
            "up_bias": (up_bias, "I"),
            "down_bias": (down_bias, "N"),
        }
        raise block_error(error, "mlp", x, layers, {"scale": (scale, "I")}) from None


def _activation_into(
    out: Tensor,
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    activation: str,
    adapter_index: Tensor | None,
) -> Tensor:
    """Write an activation into memory that the caller has."""
    check_out("scaled_activation" if up is None else "gated_activation", out, gate, up, scale)
    write = None if _fast is None or torch.compiler.is_compiling() else _fast.activation_into
    if write is not None and write(out, gate, up, scale, activation, adapter_index) is not None:
        return out
    if up is None:
        return out.copy_(scaled_activation(gate, scale, activation, adapter_index))
    return out.copy_(gated_activation(gate, up, scale, activation, adapter_index))
