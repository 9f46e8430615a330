"""Fused kernels for (IA)³: learned vectors that rescale a frozen transformer's activations.

Four operators, each differentiable, traceable by ``torch.compile`` and also registered as ``torch.ops.ia3.*``. Shapes:
``K`` = in_features, ``N`` = out_features, ``I`` = intermediate size, ``A`` = adapters, ``*`` = any batch shape. Scales
are vectors, or ``[A, n]`` matrices together with an int32 ``adapter_index`` of shape ``[*]`` that picks a row for every
position (``-1``: no scaling). Arithmetic on scales is fp32, with one rounding at the end.

Beside them, ``merge_``, ``unmerge_`` and ``swap_`` put a scale into a weight in place and take it out again to the bit.

Source of the method: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", 2022, arXiv 2205.05638.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import autograd as _autograd  # registers the gradients
from . import backends, reference, target
from .backends import Choice, explain
from .exact import Residual, merge_, stays_finite, swap_, unmerge_
from .schemas import ACTIVATIONS

del _autograd

__all__ = [
    "ACTIVATIONS",
    "Choice",
    "Residual",
    "backends",
    "explain",
    "gated_activation",
    "merge_",
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
# The native library's short cut past the dispatcher; it returns None wherever the dispatcher has work to do (gradients,
# autocast, modes, subclasses, other devices or dtypes), so that calling it first is always right.
_direct = (
    _library.direct if isinstance(_library, ModuleType) and target.requested_backend() in ("auto", "native") else None
)


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """A linear layer with learned vectors: ``((x ∘ input_scale) @ weight.T + bias) ∘ output_scale``.

    Args:
        x: ``[*, K]``, fp32, bf16, fp16 (fp64 in the reference).
        weight: ``[N, K]`` of x's dtype, any strides. A layer that stores ``[K, N]`` passes its transpose, uncopied.
        bias: ``[N]`` of x's dtype, or None.
        input_scale: ``[K]`` or ``[A, K]``, any floating dtype, or None.
        output_scale: ``[N]`` or ``[A, N]``, any floating dtype, or None. It scales the bias too.
        adapter_index: ``[*]`` int32 with two-dimensional scales, else None.

    Returns:
        ``[*, N]`` of x's dtype, contiguous.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
        IndexError: an adapter index is outside ``-1 .. A-1``.
    """
    y: Tensor | None = None
    if _direct is not None and not torch.compiler.is_compiling():
        y = _direct.scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)
    return _ops.scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index) if y is None else y


def gated_activation(
    gate: Tensor,
    up: Tensor,
    scale: Tensor | None = None,
    activation: str = "silu",
    adapter_index: Tensor | None = None,
) -> Tensor:
    """The hidden state of a gated MLP, scaled on its way into the down projection: ``act(gate) ∘ up ∘ scale``.

    Args:
        gate, up: ``[*, I]``, same shape and dtype (fp32, bf16, fp16; fp64 in the reference). Rows may be strided.
        scale: ``[I]`` or ``[A, I]``, any floating dtype, or None.
        activation: one of ``ACTIVATIONS``; ``gelu`` is the exact erf form, ``gelu_tanh`` its tanh approximation, and
            ``relu2`` the squared ReLU.
        adapter_index: ``[*]`` int32 with a two-dimensional scale, else None.

    Returns:
        ``[*, I]`` of gate's dtype, contiguous. Backward keeps gate and up alone.

    Raises:
        RuntimeError: a shape, dtype, device or activation does not fit; the message names the argument.
        IndexError: an adapter index is outside ``-1 .. A-1``.
    """
    h: Tensor | None = None
    if _direct is not None and not torch.compiler.is_compiling():
        h = _direct.gated_activation(gate, up, scale, activation, adapter_index)
    return _ops.gated_activation(gate, up, scale, activation, adapter_index) if h is None else h


def scaled_activation(
    x: Tensor, scale: Tensor | None = None, activation: str = "silu", adapter_index: Tensor | None = None
) -> Tensor:
    """The hidden state of a plain MLP, scaled on its way into the second layer: ``act(x) ∘ scale``.

    Args:
        x: ``[*, I]``, fp32, bf16, fp16 (fp64 in the reference). Rows may be strided.
        scale: ``[I]`` or ``[A, I]``, any floating dtype, or None.
        activation: one of ``ACTIVATIONS``.
        adapter_index: ``[*]`` int32 with a two-dimensional scale, else None.

    Returns:
        ``[*, I]`` of x's dtype, contiguous, never x itself. Backward keeps x alone.

    Raises:
        RuntimeError: a shape, dtype, device or activation does not fit; the message names the argument.
        IndexError: an adapter index is outside ``-1 .. A-1``.
    """
    h: Tensor | None = None
    if _direct is not None and not torch.compiler.is_compiling():
        h = _direct.scaled_activation(x, scale, activation, adapter_index)
    return _ops.scaled_activation(x, scale, activation, adapter_index) if h is None else h


def scale_weight_(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
    """Scale a weight in place, its rows (``dim=0``: ``diag(scale) W``) or its columns (``dim=1``: ``W diag(scale)``).

    Args:
        weight: ``[N, K]``, fp32, bf16, fp16 (fp64 in the reference), any strides; written in place.
        scale: ``[N]`` for ``dim=0``, ``[K]`` for ``dim=1``, any floating dtype.
        dim: 0 or 1.

    Returns:
        `weight`, for chaining.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or a gradient would have to flow through the write.
    """
    if _direct is None or torch.compiler.is_compiling() or not _direct.scale_weight_(weight, scale, dim):
        _ops.scale_weight_(weight, scale, dim)
    return weight
