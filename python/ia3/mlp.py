"""Fused feed-forward blocks: the down projection's input vector is folded into the activation before it.

A block is patched on the instance, by an attribute that hides the class's method and can be deleted again. Which
blocks can be is a table: a row names the projections and the activation, and lists every name that the class's own
method reads. A class whose method reads anything else computes something else, so no row applies to it, whatever its
children are called; that is also how a method that another library has replaced is told. One that reads these names is
tried, once, on a block of a few features: names cannot tell a product from a sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations

from ia3_kernels import gated_activation, gated_mlp, mlp, scaled_activation, scaled_linear

from . import patching
from .layers import ScaledLayer, effective_scale, is_untouched, plain_weight, project


@dataclass(frozen=True)
class Row:
    """How one family of blocks is built; names are those of its children.

    reads: every name that the method of the class reads, and no other.
    up, down, activation, gate: the projections and the activation; no ``gate`` where the block has none.
    is_joined: ``up`` computes ``[gate, up]`` side by side.
    dropout: between the activation and the down projection.
    after: applied to the down projection's output.
    norm: applied at the end, to the sum with the block's input.
    casts: the input of ``down`` takes the dtype of its weight.
    method: what is patched.
    inner, outer: the child that holds ``up`` and ``activation``, the one that holds ``down`` and what follows it, and
        what their own methods read; the block itself where not given.
    """

    family: str
    reads: frozenset[str]
    up: str
    down: str
    activation: str
    gate: str | None = None
    is_joined: bool = False
    dropout: str | None = None
    after: str | None = None
    norm: str | None = None
    casts: bool = False
    method: str = "forward"
    inner: str | None = None
    inner_reads: frozenset[str] = frozenset()
    outer: str | None = None
    outer_reads: frozenset[str] = frozenset()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CAST = "isinstance torch Tensor weight dtype int8 to"

ROWS = (
    Row("gated", _names("gate_proj up_proj down_proj act_fn"), "up_proj", "down_proj", "act_fn", gate="gate_proj"),
    Row(
        "joined gate_up",
        _names("gate_up_proj chunk activation_fn down_proj"),
        "gate_up_proj",
        "down_proj",
        "activation_fn",
        is_joined=True,
    ),
    Row(
        "T5 gated",
        _names(f"wi_0 wi_1 wo act dropout {_CAST}"),
        "wi_1",
        "wo",
        "act",
        gate="wi_0",
        dropout="dropout",
        casts=True,
    ),
    Row("T5 plain", _names(f"wi wo act dropout {_CAST}"), "wi", "wo", "act", dropout="dropout", casts=True),
    Row("GPT-2", _names("c_fc c_proj act dropout"), "c_fc", "c_proj", "act", after="dropout"),
    Row("GPT-J", _names("fc_in fc_out act dropout"), "fc_in", "fc_out", "act", after="dropout"),
    Row("GPT-NeoX", _names("dense_h_to_4h dense_4h_to_h act"), "dense_h_to_4h", "dense_4h_to_h", "act"),
    Row("Phi", _names("fc1 fc2 activation_fn"), "fc1", "fc2", "activation_fn"),
    Row(
        "BERT",
        _names("intermediate output"),
        "dense",
        "dense",
        "intermediate_act_fn",
        after="dropout",
        norm="LayerNorm",
        method="feed_forward_chunk",
        inner="intermediate",
        inner_reads=_names("dense intermediate_act_fn"),
        outer="output",
        outer_reads=_names("dense dropout LayerNorm"),
    ),
)

_BY_CLASS: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Identity: "identity"}
for _class_name, _activation in {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
    "LinearActivation": "identity",
}.items():
    if hasattr(activations, _class_name):  # the list changes between releases
        _BY_CLASS[getattr(activations, _class_name)] = _activation
_BY_FUNCTION = ((F.silu, "silu"), (F.gelu, "gelu"), (F.relu, "relu"), (torch.relu, "relu"))


def activation_name(activation: Any) -> str | None:
    """Our name of a transformers or torch activation, module or function; ``None`` where we have none."""
    kind = type(activation)
    name = _BY_CLASS.get(kind)
    if name is None and kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if name is None and not isinstance(activation, nn.Module):
        return next((name for function, name in _BY_FUNCTION if activation is function), None)
    return name


def _reads(kind: type, method: str) -> frozenset[str] | None:
    """The names that a class's method reads: attributes and globals."""
    code = getattr(getattr(kind, method, None), "__code__", None)
    return None if code is None else frozenset(code.co_names)


def row_of(block: nn.Module) -> Row | None:
    """The row that describes ``block``, or ``None``."""
    for row in ROWS:
        if _reads(type(block), row.method) != row.reads:
            continue
        holders = ((row.inner, row.inner_reads), (row.outer, row.outer_reads))
        if not all(
            name is None or _reads(type(block._modules.get(name)), "forward") == reads for name, reads in holders
        ):
            continue
        methods = [None if name is None else type(_holder(block, name)).forward for name, _ in holders]
        if _agrees(row, getattr(type(block), row.method), *methods):
            return row
    return None


class _Linear(SimpleNamespace):
    """A linear layer of a few features, as far as a method can tell; its numbers are its own."""

    def __init__(self, outputs: int, inputs: int, shift: int) -> None:
        numbers = torch.arange(outputs * inputs, dtype=torch.float64, device="cpu")
        super().__init__(weight=torch.sin(numbers + shift).view(outputs, inputs))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@functools.cache
def _agrees(row: Row, method: Any, inner_method: Any, outer_method: Any) -> bool:
    """Return whether the methods of a block compute what the row says, tried on numbers."""
    width, hidden_width = 3, 4
    # Functions that a swap or an omission of any would show
    activation, dropout = torch.sigmoid, lambda x: 1.5 * x
    after, norm = (lambda x: x + 0.25), (lambda x: 0.5 * x + 1)
    up, down = _Linear(2 * hidden_width if row.is_joined else hidden_width, width, 0), _Linear(width, hidden_width, 50)
    gate = _Linear(hidden_width, width, 100)
    block, inner, outer = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()
    if row.inner is None:
        inner = block
    else:
        setattr(block, row.inner, lambda *args: inner_method(inner, *args))
    if row.outer is None:
        outer = block
    else:
        setattr(block, row.outer, lambda *args: outer_method(outer, *args))
    parts = ((inner, row.up, up), (inner, row.activation, activation), (outer, row.down, down), (inner, row.gate, gate))
    ends = ((inner, row.dropout, dropout), (outer, row.after, after), (outer, row.norm, norm))
    for holder, name, part in (*parts, *ends):
        if name is not None:
            setattr(holder, name, part)
    x = torch.cos(torch.arange(2 * width, dtype=torch.float64, device="cpu")).view(2, width)
    try:
        result = method(block, x)
    except Exception:  # what cannot run on these parts alone needs others
        return False
    hidden = up(x)
    if row.is_joined:
        first, second = hidden.chunk(2, dim=-1)
        hidden = activation(first) * second
    else:
        hidden = activation(hidden) if row.gate is None else activation(gate(x)) * hidden
    y = down(hidden if row.dropout is None else dropout(hidden))
    y = y if row.after is None else after(y)
    y = y if row.norm is None else norm(y + x)
    return isinstance(result, Tensor) and result.shape == y.shape and torch.allclose(result, y)


def _holder(block: nn.Module, name: str | None) -> nn.Module:
    return block if name is None else block._modules[name]  # type: ignore[return-value]


def _activation_of(inner: nn.Module, row: Row) -> Any:
    activation = inner._modules.get(row.activation)
    return getattr(inner, row.activation) if activation is None else activation  # a function is no child


def obstacle(block: nn.Module, row: Row) -> str | None:
    """Why ``block`` must not run fused at this moment; ``None`` where nothing speaks against it.

    Asked before every call, because hooks, adapters and other libraries' patches come and go.
    """
    inner, outer = _holder(block, row.inner), _holder(block, row.outer)
    down = outer._modules[row.down]
    if not isinstance(down, ScaledLayer) or not down.is_feedforward:
        return f"{row.down} has no input vector"
    activation = _activation_of(inner, row)
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
    """For each down projection in a block of the table, by identity: the up projection that can take its input vector.

    ``down((act(gate) ∘ up) ∘ scale) = down(act(gate) ∘ (up ∘ scale))``, for any vector. A sentence's end instead where
    that does not hold.
    """
    found: dict[int, UpProjection | str] = {}
    for path, block in model.named_modules():
        row = row_of(block)
        if row is None:
            continue
        name = f"the {type(block).__name__} {path!r}"
        inner = _holder(block, row.inner)
        up: Any = inner._modules[row.up]
        answer: UpProjection | str
        if row.gate is None and not row.is_joined:
            answer = f"{name} has no gate, so that an activation stands between it and the rows of {row.up}"
        elif not _runs_method(block, row):
            answer = f"the {row.method} of {name} was replaced, and may compute something else"
        else:
            place = ".".join(part for part in (path, row.inner, row.up) if part)
            answer = UpProjection(place, up, up.out_features // 2 if row.is_joined else 0)
        found[id(_holder(block, row.outer)._modules[row.down])] = answer
    return found


def _runs_method(block: nn.Module, row: Row) -> bool:
    """Whether the block computes what its class's method does: by itself, by our patch, or inside accelerate's hook."""
    own = block.__dict__.get("_old_forward" if "_hf_hook" in block.__dict__ else row.method)
    is_patch = isinstance(own, functools.partial) and own.func is fused_forward
    return own is None or is_patch or getattr(own, "__func__", None) is getattr(type(block), row.method)


def fused_forward(block: nn.Module, row: Row, x: Tensor) -> Tensor:
    """What the class's method computes, with ``scale`` inside the activation kernel; x ``[*, hidden]``.

    ``down(act(gate(x)) ∘ up(x) ∘ scale)``, or ``down(act(up(x)) ∘ scale)`` without a gate. With no active vector, or
    something in the way, it is the class's own method.
    """
    # Any: children are looked up by name, and every name was checked against the class when the row was chosen.
    inner: Any = _holder(block, row.inner)
    outer: Any = _holder(block, row.outer)
    down: Any = outer._modules[row.down]
    y: Tensor
    scale, index = effective_scale(down, x) if obstacle(block, row) is None else (None, None)
    if scale is None:
        y = getattr(type(block), row.method)(block, x)
        return y
    activation: Any = activation_name(_activation_of(inner, row))
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
    if row.casts and hidden.dtype != base.weight.dtype and base.weight.is_floating_point():
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
    """The row by which ``block`` is patched, or ``None``."""
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
