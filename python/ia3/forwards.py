"""Functions that stand in for a layer's own ``forward``: on the instance, where they can be taken back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

Forward = Callable[[Any, Tensor], Tensor]
# Where a layer's forward is looked up on the instance: accelerate's hooks (``device_map``) move it to the first name.
_PLACES = ("_old_forward", "forward")


def is_replaced(layer: nn.Module) -> bool:
    """Whether ``layer`` runs anything but its class's ``forward``, inside of accelerate's hooks if it has them."""
    inner = layer.__dict__.get("_old_forward" if "_old_forward" in layer.__dict__ else "forward")
    return inner is not None and getattr(inner, "__func__", None) is not type(layer).forward


def replace(layer: nn.Module, function: Forward) -> None:
    """Let ``layer`` run ``function(layer, x)``, inside of whatever hooks it has."""
    place = next((name for name in _PLACES if name in layer.__dict__), "forward")
    # A partial can be copied and pickled with the layer.
    layer.__dict__[place] = functools.partial(function, layer)


def restore(layer: nn.Module, functions: Collection[Forward]) -> None:
    """Let ``layer`` run its class's ``forward`` again where one of ``functions`` stands in for it."""
    for place in _PLACES:
        if getattr(layer.__dict__.get(place), "func", None) in functions:
            del layer.__dict__[place]
            if place == "_old_forward":  # which a hook calls, and no class has
                layer.__dict__[place] = types.MethodType(type(layer).forward, layer)
