"""Quantized weights: their scales, read, multiplied row by row and put back, without touching a code. A file a format.

Each format stores codes, and a scale for every row, or for every block within a row; the value is their product (plus,
in some, an offset that has a scale of its own). Rows multiplied by a vector are therefore the same codes with their
scales multiplied. Columns are not: they share scales, and their weight has to be quantized anew, by its own library.

A format's functions take the layer, and a *state*: what merging may replace, as the library keeps it. None changes
tensors of a state, so that one read before a merge restores the layer afterwards.

Some layers' own ``forward`` loses gradients with no more than a warning, or wastes memory on them; their formats have a
function that stands in for it. To add a format, add a file here with a subclass of :class:`Format`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...patching import replace, restore

State = dict[str, Any]
# Parts of a frozen weight [out, in] as plain values, with the rows that each is.
Parts = Iterator[tuple[slice, Tensor]]


class Format(ABC):
    """Say what a kind of quantized layer stores, and where.

    layers: the names of its classes; names, because they come with optional packages.
    """

    layers: ClassVar[frozenset[str]]
    # A function of the layer and its input that stands in for its ``forward`` where that loses gradients, or None.
    forward: ClassVar[Any] = None

    @classmethod
    def holds(cls, layer: type, weight: type) -> bool:
        """Return whether layers of a class whose weights are of another are of this format."""
        return any(kind.__name__ in cls.layers for kind in layer.__mro__)

    @abstractmethod
    def obstacle(self, layer: Any) -> str | None:
        """Return why its rows have no scales of their own; ``None`` where they have."""

    def requantize_obstacle(self, layer: Any) -> str | None:
        """Return why it cannot be quantized anew; ``None`` where it can."""
        return self.obstacle(layer)

    @abstractmethod
    def read(self, layer: Any, with_codes: bool = False) -> State:
        """Return what the layer holds now, ``scales [out, ...]``; with its codes where they are to be replaced."""

    @abstractmethod
    def write(self, layer: Any, state: State) -> None:
        """Let the layer hold a state, on the device where it is now."""

    def scales(self, state: State) -> Tensor:
        """Return the scales of a state in fp32, of whatever shape, for what checks them."""
        scales: Tensor = state["scales"]
        return scales.float()

    def scaled(self, layer: Any, state: State, rows: Tensor) -> State:
        """Return the state whose rows are ``rows [out]`` times those of ``state``; its codes are those of ``state``."""
        scales: Tensor = state["scales"]
        factors = rows.to(scales.device).view(-1, *(1,) * (scales.dim() - 1))
        return {"scales": (scales.to(rows.dtype) * factors).to(scales.dtype)}

    def columns(self, layer: Any, vector: Tensor) -> Tensor:
        """Return a vector over the layer's inputs, in the order of its columns."""
        return vector

    @abstractmethod
    def values(self, layer: Any) -> Tensor:
        """Return the weight ``[out, in]`` that the layer holds, in fp32."""

    @abstractmethod
    def quantize(self, layer: Any, state: State, weight: Tensor) -> State:
        """Return the state, with codes, of ``weight [out, in]`` in fp32, quantized as ``state`` was, by its library."""


class FrozenProduct(torch.autograd.Function):
    """Compute ``run(x) = x @ W.T + b``; ``unpack`` gives the parts of ``W`` in a dtype, anew in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], unpack: Callable[[torch.dtype], Parts]) -> Tensor:
        ctx.unpack = unpack
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        parts = (dy[..., rows] @ values for rows, values in ctx.unpack(dy.dtype))
        return functools.reduce(torch.add, parts), None, None


def wants_gradient(x: Tensor) -> bool:
    """Return whether the gradient of ``x`` is asked for."""
    return torch.is_grad_enabled() and x.requires_grad


def format_of(layer: nn.Module) -> Format | None:
    """Return the format of a quantized layer, or ``None``."""
    kinds: Any = type(layer), type(layer._parameters.get("weight"))
    return _format_of(*kinds)


@functools.lru_cache
def _format_of(layer: type, weight: type) -> Format | None:
    return next((known for known in FORMATS if known.holds(layer, weight)), None)


def make_differentiable(model: nn.Module) -> None:
    """Give every layer of ``model`` that loses gradients its format's ``forward``; :func:`give_back` undoes it."""
    for layer in model.modules():
        known = None if "ia3_l" in layer._modules else format_of(layer)  # PEFT's wrappers have their base's name
        if known is not None and known.forward is not None:
            replace(layer, known.forward)


def give_back(model: nn.Module) -> None:
    """Undo :func:`make_differentiable`."""
    functions = [known.forward for known in FORMATS if known.forward is not None]
    for layer in model.modules():
        restore(layer, functions)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

FORMATS: tuple[Format, ...] = tuple(kind() for kind in Format.__subclasses__())
