"""Which classes of feed-forward blocks can be fused: a table, and how a class is told to be one of its rows.

A row names the projections and the activation, and lists every name that the class's own method reads. A class whose
method reads anything else computes something else, so no row applies to it, whatever its children are called; that is
also how a method that another library has replaced is told. One that reads these names is tried, once, on a block of a
few features: names cannot tell a product from a sum. A family of models is one row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations

from .probing import numbers


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
    """Return the kernels' name of a transformers or torch activation, module or function; ``None`` for others."""
    kind = type(activation)
    name = _BY_CLASS.get(kind)
    if name is None and kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if name is None and not isinstance(activation, nn.Module):
        return next((name for function, name in _BY_FUNCTION if activation is function), None)
    return name


def _reads(kind: type, method: str) -> frozenset[str] | None:
    """Return the names that a class's method reads: attributes and globals."""
    code = getattr(getattr(kind, method, None), "__code__", None)
    return None if code is None else frozenset(code.co_names)


def row_of(block: nn.Module) -> Row | None:
    """Return the row that describes ``block``, or ``None``."""
    for row in ROWS:
        if _reads(type(block), row.method) != row.reads:
            continue
        holders = ((row.inner, row.inner_reads), (row.outer, row.outer_reads))
        if not all(
            name is None or _reads(type(block._modules.get(name)), "forward") == reads for name, reads in holders
        ):
            continue
        methods = [None if name is None else type(holder(block, name)).forward for name, _ in holders]
        if _agrees(row, getattr(type(block), row.method), *methods):
            return row
    return None


class _Linear(SimpleNamespace):
    """A linear layer of a few features, as far as a method can tell; its numbers are its own."""

    def __init__(self, outputs: int, inputs: int, shift: int) -> None:
        super().__init__(weight=numbers(outputs, inputs, shift=shift))

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
    x = numbers(2, width, shift=150)
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


def holder(block: nn.Module, name: str | None) -> nn.Module:
    """Return the child of this name, or the block itself."""
    return block if name is None else block._modules[name]  # type: ignore[return-value]


def activation_of(inner: nn.Module, row: Row) -> Any:
    """Return a block's activation, a module or a function."""
    activation = inner._modules.get(row.activation)
    return getattr(inner, row.activation) if activation is None else activation  # a function is no child
