"""``accelerate`` and ``decelerate``: PEFT's own models on our kernels, in place, and back."""

from __future__ import annotations

import functools
import logging
from typing import Any, TypeVar

from torch import nn

from .errors import IA3Error
from .layers import IA3Layer
from .mlp import fuse, unfuse
from .reporting import report

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)
# The methods by which transformers puts adapters into a model that no PeftModel wraps.
_INJECTING = ("add_adapter", "load_adapter")


def accelerate(model: _Model) -> _Model:
    """Run the IA3 layers of a ``peft.PeftModel`` on our kernels; returns ``model`` itself, changed in place.

    Also takes a transformers model with adapters of its own (``add_adapter``, ``load_adapter``). Layers stay what they
    are for everybody else: instances of PEFT's classes, with the same parameters and names in ``state_dict``. What PEFT
    does afterwards (adding, switching, merging, deleting adapters) works, and keeps the model accelerated. What runs
    where is in ``ia3.report(model)``, and in the log at level INFO.

    Call it before sharding (FSDP) and compiling. A model that is accelerated already stays so. Raises
    :class:`~ia3.errors.IA3Error` where there is nothing to accelerate.
    """
    layers = _peft_layers()
    if not isinstance(model, nn.Module):
        raise IA3Error(f"model is a {type(model).__name__}; expected a peft.PeftModel or a transformers model.")
    if any(isinstance(module, IA3Layer) for module in model.modules()):
        return model  # made by ia3.get_peft_model
    if not any(isinstance(module, layers.IA3Layer) for module in model.modules()):
        raise IA3Error(
            f"this {type(model).__name__} has no IA3 layers of PEFT; put an adapter in first, with peft.get_peft_model "
            "or the model's add_adapter."
        )
    layers.swap_layers(model)
    fuse(model)
    if not any(isinstance(module, layers.IA3Model) for module in model.modules()):
        for name in _INJECTING:
            if hasattr(type(model), name):
                # A partial on the instance can be copied and pickled with the model, and deleted again.
                setattr(model, name, functools.partial(_inject_and_accelerate, model, name))
    logger.info("accelerated:\n%s", report(model))
    return model


def decelerate(model: _Model) -> _Model:
    """Undo :func:`accelerate`; returns ``model`` itself."""
    _peft_layers().restore_layers(model)
    unfuse(model)
    for name in _INJECTING:
        if _is_ours(model.__dict__.get(name)):
            delattr(model, name)
    return model


def _peft_layers() -> Any:
    try:
        from . import peft_layers
    except ImportError as error:
        raise IA3Error(
            f"PEFT cannot be imported ({error}), and accelerate works on its models: pip install 'ia3-kernels[peft]'."
        ) from error
    return peft_layers


def _inject_and_accelerate(model: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """The method of the class; then the layers that it put in are accelerated as well."""
    result = getattr(type(model), method)(model, *args, **kwargs)
    _peft_layers().swap_layers(model)
    fuse(model)
    return result


def _is_ours(patch: Any) -> bool:
    return isinstance(patch, functools.partial) and patch.func is _inject_and_accelerate
