"""Fused feed-forward blocks: the down projection's input vector is folded into the activation before it.

A block is patched on the instance, by an attribute that hides the class's method and can be deleted again. Which blocks
can be is a table: see :mod:`~ia3.blocks`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ia3_kernels import gated_activation, gated_mlp, mlp, scaled_activation, scaled_linear

from . import patching
from .blocks import ROWS, Row, activation_name, activation_of, holder, row_of
from .layers import ScaledLayer, effective_scale, is_untouched, plain_weight, project


def obstacle(block: nn.Module, row: Row) -> str | None:
    """Return why ``block`` must not run fused at this moment; ``None`` where it may.

    Asked before every call, because hooks, adapters and other libraries' patches come and go.
    """
    inner, outer = holder(block, row.inner), holder(block, row.outer)
    down = outer._modules[row.down]
    if not isinstance(down, ScaledLayer) or not down.is_feedforward:
        return f"{row.down} has no input vector"
    activation = activation_of(inner, row)
    if activation_name(activation) is None:
        return f"the activation {getattr(activation, '__name__', type(activation).__name__)} has no kernel"
    if inner is not block and not is_untouched(inner):
        return _skipped(inner)
    if outer is not block and not is_untouched(outer):
        return _skipped(outer)
    if isinstance(activation, nn.Module) and not is_untouched(activation):
        return _skipped(activation)
    return None if is_untouched(down) else _skipped(down)


def _skipped(module: nn.Module) -> str:
    return f"{type(module).__name__} has hooks or a forward of its own, which fusing would skip"


@dataclass(frozen=True)
class UpProjection:
    """The projection whose rows from ``start`` on are what the inputs of a down projection are proportional to."""

    path: str
    module: nn.Module
    start: int


def up_projections(model: nn.Module) -> dict[int, UpProjection | str]:
    """Return, by the identity of each down projection in a block of the table, the up projection for its input vector.

    ``down((act(gate) ∘ up) ∘ scale) = down(act(gate) ∘ (up ∘ scale))``, for any vector. A sentence's end instead where
    that does not hold.
    """
    found: dict[int, UpProjection | str] = {}
    for path, block in model.named_modules():
        row = row_of(block)
        if row is None:
            continue
        name = f"the {type(block).__name__} {path!r}"
        inner = holder(block, row.inner)
        up: Any = inner._modules[row.up]
        answer: UpProjection | str
        if row.gate is None and not row.is_joined:
            answer = f"{name} has no gate, so that an activation stands between it and the rows of {row.up}"
        elif not _runs_method(block, row):
            answer = f"the {row.method} of {name} was replaced, and may compute something else"
        else:
            place = ".".join(part for part in (path, row.inner, row.up) if part)
            answer = UpProjection(place, up, up.out_features // 2 if row.is_joined else 0)
        found[id(holder(block, row.outer)._modules[row.down])] = answer
    return found


def _runs_method(block: nn.Module, row: Row) -> bool:
    """Return whether the block computes what its class's method does: itself, patched, or in accelerate's hook."""
    own = block.__dict__.get("_old_forward" if "_hf_hook" in block.__dict__ else row.method)
    is_patch = isinstance(own, functools.partial) and own.func is fused_forward
    return own is None or is_patch or getattr(own, "__func__", None) is getattr(type(block), row.method)


@patching.stand_in
def fused_forward(block: nn.Module, row: Row, x: Tensor) -> Tensor:
    """Return what the class's method computes, with ``scale`` inside the activation kernel; x ``[*, hidden]``.

    ``down(act(gate(x)) ∘ up(x) ∘ scale)``, or ``down(act(up(x)) ∘ scale)`` without a gate. With no active vector, or
    something in the way, it is the class's own method.
    """
    # Any: children are looked up by name, and every name was checked against the class when the row was chosen.
    inner: Any = holder(block, row.inner)
    outer: Any = holder(block, row.outer)
    down: Any = outer._modules[row.down]
    y: Tensor
    scale, index = effective_scale(down, x) if obstacle(block, row) is None else (None, None)
    if scale is None:
        y = getattr(type(block), row.method)(block, x)
        return y
    activation: Any = activation_name(activation_of(inner, row))
    whole = None if index is not None or row.is_joined else _run_as_one(inner, down, row, x, scale, activation)
    if whole is not None:
        return _finish(outer, row, whole, x)
    up = project(inner._modules[row.up], x)
    if row.is_joined:
        gate, up = up.chunk(2, dim=-1)
        hidden = gated_activation(gate, up, scale, activation, index)
    elif row.gate is not None:
        hidden = gated_activation(project(inner._modules[row.gate], x), up, scale, activation, index)
    else:
        hidden = scaled_activation(up, scale, activation, index)
    if row.dropout is not None:
        hidden = inner._modules[row.dropout](hidden)
    base: Any = down._modules["base_layer"]
    # A layer that torch.ao quantized has a method of that name.
    if row.casts and isinstance(base.weight, Tensor) and base.weight.is_floating_point():
        hidden = hidden.to(base.weight.dtype)
    return _finish(outer, row, project(base, hidden), x)


def _finish(outer: Any, row: Row, y: Tensor, x: Tensor) -> Tensor:
    """Apply what stands behind the down projection."""
    if row.after is not None:
        y = outer._modules[row.after](y)
    if row.norm is not None:
        y = outer._modules[row.norm](y + x)
    return y


class _Projection(NamedTuple):
    """A linear layer whose parameters are frozen, and the vectors around it; None for what it has not."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    input_scale: Tensor | None
    output_scale: Tensor | None


def _projection(layer: Any, x: Tensor) -> _Projection | None:
    """Return what ``layer`` computes on ``x``, in parts; None where it is more than that, or its weight is trained."""
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    if isinstance(layer, ScaledLayer):
        if not is_untouched(layer) or layer.merged_adapters:
            return None
        scale, index = effective_scale(layer, x)
        if index is not None:
            return None
        scales = (scale, None) if layer.is_feedforward else (None, scale)
        layer = layer._modules["base_layer"]
    weight = plain_weight(layer)
    if weight is None:
        return None
    bias = layer._parameters["bias"]
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    return _Projection(weight, bias, *scales)


def _run_as_one(inner: Any, down: Any, row: Row, x: Tensor, scale: Tensor, activation: str) -> Tensor | None:
    """Run the block as one operator with one autograd node; None where its weights or what stands between forbid it."""
    if row.dropout is not None:
        dropout = inner._modules[row.dropout]
        if not is_untouched(dropout) or (dropout.training and getattr(dropout, "p", 1.0) > 0):
            return None
    last, up = _projection(down._modules["base_layer"], x), _projection(inner._modules[row.up], x)
    if last is None or up is None or last.weight.dtype != up.weight.dtype:
        return None
    if row.gate is None:
        if up.input_scale is not None or up.output_scale is not None:
            return None
        return mlp(x, up.weight, last.weight, scale, activation, up.bias, last.bias)
    if up.output_scale is not None:
        # What multiplies up multiplies the hidden state: act(g) ∘ (u ∘ s_u) ∘ s = act(g) ∘ u ∘ (s_u ∘ s)
        scale = scale.reshape(-1) * up.output_scale.reshape(-1)
    gate = _projection(inner._modules[row.gate], x)
    if gate is None or gate.output_scale is not None or any(part.bias is not None for part in (gate, up, last)):
        hidden = gated_activation(
            project(inner._modules[row.gate], x),
            scaled_linear(x, up.weight, up.bias, up.input_scale),
            scale,
            activation,
        )
        return scaled_linear(hidden, last.weight, last.bias)
    return gated_mlp(x, gate.weight, up.weight, last.weight, scale, activation, gate.input_scale, up.input_scale)


def patch_of(block: nn.Module) -> Row | None:
    """Return the row by which ``block`` is patched, or ``None``."""
    for row in ROWS:
        patch = block.__dict__.get(row.method)
        if isinstance(patch, functools.partial) and patch.func is fused_forward:
            applied: Row = patch.args[1]
            return applied
    return None


def fuse(model: nn.Module) -> list[str]:
    """Patch every block of ``model`` that a row describes and nothing stands in the way of; returns their names."""
    patched = []
    for path, block in model.named_modules():
        row = row_of(block)
        if row is None or row.method in block.__dict__ or obstacle(block, row) is not None:
            continue
        patching.bind(block, row.method, fused_forward, row)
        patched.append(path)
    return patched


def unfuse(model: nn.Module) -> None:
    """Take every patch back."""
    for block in model.modules():
        row = patch_of(block)
        if row is not None:
            patching.unbind(block, row.method)
