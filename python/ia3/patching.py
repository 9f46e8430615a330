"""Functions that stand in for a module's own method: on the instance, where they can be taken back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

Forward = Callable[[Any, Tensor], Tensor]
# Where a layer's forward is looked up on the instance: accelerate's hooks (``device_map``) move it to the first name.
_PLACES = ("_old_forward", "forward")
# What ``nn.DataParallel`` calls on every module.
_REPLICATE = "_replicate_for_data_parallel"


def stand_in(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let the input of ``function``, its last argument, be passed under the name that the method has for it."""

    # What looks at the signature sees that of ``function``: transformers counts a chunked method's arguments.
    @functools.wraps(function)
    def forward(module: Any, *args: Any, **named: Tensor) -> Tensor:
        return function(module, *args, *named.values())

    return forward


def bind(module: nn.Module, method: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Let ``module.method(…)`` be ``function(module, *arguments, …)``; of copies and replicas, with them in its place.

    A partial on the instance, unlike a closure or a bound method, can be copied and pickled with the module.
    """
    module.__dict__[method] = functools.partial(function, module, *arguments)
    module.__dict__[_REPLICATE] = functools.partial(_replicate, module)


def unbind(module: nn.Module, method: str) -> None:
    """Undo :func:`bind`."""
    del module.__dict__[method]
    module.__dict__.pop(_REPLICATE, None)


def _replicate(module: nn.Module) -> nn.Module:
    """Return the class's replica, whose partials are bound to itself, where they find its parameters."""
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    for name, value in module.__dict__.items():
        if isinstance(value, functools.partial) and value.args and value.args[0] is module:
            replica.__dict__[name] = functools.partial(value.func, replica, *value.args[1:])
    return replica


def is_replaced(layer: nn.Module) -> bool:
    """Return whether ``layer`` runs anything but its class's ``forward``, inside of accelerate's hooks if any."""
    inner = layer.__dict__.get("_old_forward" if "_old_forward" in layer.__dict__ else "forward")
    return inner is not None and getattr(inner, "__func__", None) is not type(layer).forward


def replace(layer: nn.Module, function: Forward) -> None:
    """Let ``layer`` run ``function(layer, x)``, inside of whatever hooks it has."""
    bind(layer, next((name for name in _PLACES if name in layer.__dict__), "forward"), function)


def restore(layer: nn.Module, functions: Collection[Forward]) -> None:
    """Let ``layer`` run its class's ``forward`` again where one of ``functions`` stands in for it."""
    for place in _PLACES:
        if getattr(layer.__dict__.get(place), "func", None) in functions:
            unbind(layer, place)
            if place == "_old_forward":  # which a hook calls, and no class has
                layer.__dict__[place] = types.MethodType(type(layer).forward, layer)


def runs_class_forward(layer: nn.Module) -> bool:
    """Return whether calling ``layer`` computes what its class's ``forward`` does, and nothing beside it.

    What stands in for it here computes the same. The hooks by which accelerate moves inputs to a layer's device leave
    its values alone, and are let pass; those that bring an offloaded weight are not.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if nn_module._has_any_global_hook():
        return False
    hook = layer.__dict__.get("_hf_hook")
    place = "forward"
    if hook is not None:
        if type(hook).__name__ != "AlignDevicesHook" or hook.offload:
            return False
        place = "_old_forward"
    forward = layer.__dict__.get(place)
    return forward is None or is_stand_in(forward) or getattr(forward, "__func__", None) is type(layer).forward


def execution_device(layer: nn.Module) -> torch.device | None:
    """Return where a layer runs whose weights accelerate keeps elsewhere (offloaded); None for any other."""
    hook: Any = layer.__dict__.get("_hf_hook")
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "offload", False) and part.execution_device is not None:
            return torch.device(part.execution_device)
    return None


def is_stand_in(forward: Any) -> bool:
    """Return whether :func:`replace` put ``forward`` where it is."""
    function = getattr(forward, "func", None)
    return getattr(function, "__module__", "").partition(".")[0] == __name__.partition(".")[0]
