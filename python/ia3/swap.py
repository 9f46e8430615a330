"""The swap: PEFT's objects in a model get this package's classes and patches, and give them back.

An accelerated object is the same object with another class: a subclass of its PEFT class, of the same name, so that
``isinstance``, parameters, names, ``repr`` and everything that PEFT does to it stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from . import experts, mlp
from .layers import ScaledLayer, give_back_frozen, speed_up_frozen
from .merging import formats

_Class = TypeVar("_Class", bound=type)
# The names under which PEFT's layers, tuners and models hold what they wrap.
_WRAPPED = ("base_layer", "model", "base_model")
# PEFT's class -> this package's
_CLASSES: dict[type, type] = {}


def in_place_of(theirs: type) -> Any:
    """Return a class decorator: objects of ``theirs`` get the decorated class, their subclass."""

    def register(accelerated: _Class) -> _Class:
        _CLASSES[theirs] = accelerated
        return accelerated

    return register


def accelerated_class(theirs: type) -> Any:
    """Return the class that objects of ``theirs`` get."""
    return _CLASSES[theirs]


def install(model: nn.Module) -> None:
    """Give PEFT's objects in ``model`` their accelerated classes, and patch what stands around them."""
    # From the inside out: a wrapper takes the mode, training or not, of what it wraps.
    for module in reversed(list(model.modules())):
        if isinstance(module, ModulesToSaveWrapper):
            module.training = module.modules_to_save.training = module.original_module.training
        kind = _CLASSES.get(type(module))
        if kind is None:
            continue
        module.__class__ = kind
        inner: Any = next(module._modules[name] for name in _WRAPPED if name in module._modules)
        module.training = inner.training
        if isinstance(module, ScaledLayer):
            module.ia3_l.training = inner.training
            module.note_running()
    _part_shared(model)
    formats.make_differentiable(model)
    speed_up_frozen(model)
    mlp.fuse(model)
    experts.patch(model)


def uninstall(model: nn.Module) -> None:
    """Take back the patches of :func:`install`."""
    experts.give_back(model)
    mlp.unfuse(model)
    give_back_frozen(model)
    formats.give_back(model)


def _part_shared(model: nn.Module) -> None:
    """Give a layer that also stands elsewhere in the model, unscaled, a twin with the same parameters.

    One layer cannot be merged for one of its two parents only; two that share parameters can.
    """
    parents: dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            parents[id(child)] = parents.get(id(child), 0) + 1
    for module in model.modules():
        base = module._modules.get("base_layer")
        if isinstance(module, ScaledLayer) and base is not None and parents[id(base)] > 1:
            twin = base.__class__.__new__(base.__class__)
            twin.__dict__.update(base.__dict__)
            for name in ("_parameters", "_buffers", "_modules"):
                twin.__dict__[name] = dict(base.__dict__[name])
            module._modules["base_layer"] = twin


def give_back_classes(model: nn.Module) -> None:
    """Give the objects in ``model`` PEFT's classes back."""
    originals = {accelerated: theirs for theirs, accelerated in _CLASSES.items()}
    for module in model.modules():
        theirs = originals.get(type(module))
        if theirs is not None:
            module.__class__ = theirs
            for name in ("_running", "_sites", "bank"):
                module.__dict__.pop(name, None)


@contextmanager
def all_or_nothing(model: nn.Module, adapter_name: str | None = None) -> Iterator[None]:
    """Put modules, parameters and ``requires_grad`` back as they were if the block raises.

    adapter_name: of the adapter that the block adds, if it adds one.
    """
    before = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = model.__dict__.get("peft_config")
    known = None if configs is None else dict(configs)
    try:
        yield
    except BaseException:
        uninstall(model)
        for module, children, parameters in before:
            pairs: Any = ((module._modules, children), (module._parameters, parameters))
            for now, then in pairs:
                now.clear()
                now.update(then)
            if isinstance(module, ModulesToSaveWrapper):
                module._adapters.discard(adapter_name)
        if configs is None or known is None:
            model.__dict__.pop("peft_config", None)
        else:
            configs.clear()
            configs.update(known)
            model.__dict__["peft_config"] = configs
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        if any(isinstance(module, ScaledLayer) for module in model.modules()):
            install(model)
        raise
