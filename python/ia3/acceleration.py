"""``accelerate``: PEFT's models as they are, on this package's kernels, and back again."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import peft
from peft.tuners.ia3.layer import IA3Layer
from torch import nn

from . import experts, fused
from . import model as _model  # registers the classes of models
from .config import IA3Config
from .errors import IA3Error
from .merging import model as merging
from .peft_layers import MergingLayer, injecting
from .planning import plan_adapter
from .reporting import log_report
from .swap import all_or_nothing, give_back_classes, install, uninstall
from .tuner import IA3Model, check_name

del _model

_Model = TypeVar("_Model", bound=nn.Module)
# The methods by which transformers puts adapters into a model that no PeftModel wraps.
_INJECTING = ("add_adapter", "load_adapter")


def accelerate(model: _Model) -> _Model:
    """Run the IA3 layers of a ``peft.PeftModel`` on this package's kernels; returns ``model`` itself, changed in place.

    Also takes a transformers model with adapters of its own (``add_adapter``, ``load_adapter``). Layers stay what they
    are for everybody else: instances of PEFT's classes, with the same parameters and names in ``state_dict``. What PEFT
    does afterwards (adding, switching, merging, deleting adapters) works, and keeps the model accelerated. What runs
    where is in ``ia3.report(model)``, and in the log at level INFO.

    Call it before sharding (FSDP) and compiling. A model that is accelerated already stays so. Raises
    :class:`~ia3.errors.IA3Error` where there is nothing to accelerate.
    """
    if not isinstance(model, nn.Module):
        raise IA3Error(f"model is a {type(model).__name__}; expected a peft.PeftModel or a transformers model.")
    if not any(isinstance(module, IA3Layer) for module in model.modules()):
        raise IA3Error(
            f"this {type(model).__name__} has no IA3 layers of PEFT; put an adapter in first, with get_peft_model or "
            "the model's add_adapter."
        )
    install(model)
    if not any(isinstance(module, IA3Model) for module in model.modules()):
        for name in _INJECTING:
            if hasattr(type(model), name):
                # A partial on the instance can be copied and pickled with the model, and deleted again.
                setattr(model, name, functools.partial(_inject_and_install, model, name))
    log_report(model)
    return model


def decelerate(model: _Model) -> _Model:
    """Undo :func:`accelerate`; returns ``model`` itself. Weights that hold vectors are unmerged."""
    if any(isinstance(module, experts.Experts) for module in model.modules()):
        raise IA3Error("the model has vectors on experts, which PEFT has no layers for; unload() the adapters instead.")
    if any(isinstance(module, IA3Model) and module.bank is not None for module in model.modules()):
        raise IA3Error("the model has a bank, which needs its layers; close the bank first.")
    merged = [("layer", layer) for layer in model.modules() if isinstance(layer, MergingLayer) and layer._merge_state]
    if merged:
        merging.unmerge(model, merged)
    fused.settle(model)
    uninstall(model)
    give_back_classes(model)
    for name in _INJECTING:
        patch = model.__dict__.get(name)
        if isinstance(patch, functools.partial) and patch.func is _inject_and_install:
            delattr(model, name)
    return model


def _inject_and_install(model: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method of the class; then the layers that it put in are accelerated as well."""
    result = getattr(type(model), method)(model, *args, **kwargs)
    install(model)
    return result


def inject_adapter_in_model(
    peft_config: peft.IA3Config, model: nn.Module, adapter_name: str = "default", **kwargs: Any
) -> nn.Module:
    """Put a new adapter into ``model`` and return ``model`` itself, with no wrapper around it; as PEFT's function."""
    if not isinstance(model, nn.Module):
        raise IA3Error(f"model is a {type(model).__name__}; expected an nn.Module: load it first.")
    check_name(adapter_name)
    config = IA3Config.of(peft_config)
    plan = plan_adapter(model, config, strict="state_dict" not in kwargs)
    with all_or_nothing(model, adapter_name):
        with injecting(model, plan, adapter_name):
            peft.inject_adapter_in_model(plan.exact_config(), model, adapter_name, **kwargs)
        configs: Any = model.peft_config
        configs[adapter_name] = plan.config
        return accelerate(model)
