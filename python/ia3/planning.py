"""What a configuration means in a model: modules, parameters of experts, and keys and values of fused projections."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import peft
from torch import nn

from . import matching
from .config import IA3Config
from .errors import IA3Error
from .experts import BLOCKWISE, DOWN, Experts, ExpertsMatrix, implementation_of
from .fused import LAYOUTS, queries
from .matching import Plan, Target, is_excluded
from .probing import base_of, carriers, features, model_type, named_base_modules

# The layers beside the experts that a model type's default targets are; a down projection where it has linear ones.
_SPLIT = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "llama4_text")
_LINEAR = {
    **dict.fromkeys(_SPLIT, ("k_proj", "v_proj", DOWN)),
    "deepseek_v2": ("kv_b_proj", DOWN),
    "deepseek_v3": ("kv_b_proj", DOWN),
}
_REGISTERED = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate", "config")


def check_unadapted(model: Any) -> None:
    """Raise :class:`IA3Error` for what is no model, or has adapters already."""
    if not isinstance(model, nn.Module):
        raise IA3Error(f"model is a {type(model).__name__}; expected an nn.Module: load it first.")
    if isinstance(model, peft.PeftModel) or any(True for _ in carriers(model)):
        raise IA3Error(
            "the model already carries adapters; add another with add_adapter or load_adapter, run those that it has "
            "with ia3.accelerate, or take them out with unload() first."
        )


def plan_adapter(model: nn.Module, config: IA3Config, *, strict: bool = True) -> Plan:
    """Find what ``config`` means in ``model`` without changing either; see :func:`ia3.matching.plan_modules`.

    Also of ``target_parameters`` and ``scale_queries``, which PEFT does not know. Raises :class:`IA3Error`.
    """
    plan = _plan(model, _with_defaults(model, config), strict)
    scaled = (target for target in plan.targets if not target.is_feedforward)
    if not plan.config.scale_queries and all(queries(model, one.path, one.module) is None for one in scaled):
        raise IA3Error(
            f"scale_queries is False, but no target is a fused projection that is known here, as {model_type(model)!r} "
            f"has {LAYOUTS.get(model_type(model) or '', ('none',))[0]!r}; leave it out, and the queries' projections "
            "out of target_modules."
        )
    return plan


def _plan(model: nn.Module, config: IA3Config, strict: bool) -> Plan:
    entries = config.target_parameters
    if not entries:
        return matching.plan_modules(model, config, strict=strict)
    own = matched_parameters(model, entries, config, strict)
    # Feed-forward entries that mean parameters are those that the last lines here have written.
    modules, feedforward = config.target_modules, config.feedforward_modules
    if isinstance(feedforward, set):
        feedforward = {entry for entry in feedforward if not _means(entry, entries) or entry in (modules or ())}
    if modules is None and model_type(model) not in matching.TARGETS:
        config.target_modules = modules = set()
    config.feedforward_modules = set() if not modules and modules is not None else feedforward
    plan = matching.plan_modules(model, config, strict=strict)
    config = plan.config
    if isinstance(config.target_modules, str) or isinstance(config.feedforward_modules, str):
        config.target_modules = {target.path for target in plan.targets}
        config.feedforward_modules = {target.path for target in plan.targets if target.is_feedforward}
    # PEFT, which knows no target_parameters of IA3's, would load the rest of such an adapter. A feed-forward module
    # that is no target it refuses.
    assert isinstance(config.feedforward_modules, set)
    config.feedforward_modules |= {".".join(target.path.split(".")[-2:]) for target in own}
    return dataclasses.replace(plan, targets=(*plan.targets, *own))


def _means(entry: str, parameters: list[str]) -> bool:
    return any(f".{one}".endswith(f".{entry}") or f".{entry}".endswith(f".{one}") for one in parameters)


def _with_defaults(model: nn.Module, config: IA3Config) -> IA3Config:
    """Return a copy in which nothing is None that mixtures of experts have defaults for; warns of them."""
    config = copy.deepcopy(config)
    names = _LINEAR.get(model_type(model) or "")
    if config.target_modules is not None or names is None:
        return config
    if config.target_parameters is None:
        entries = [f"experts.{DOWN}"]
        if not any(f".{name}".endswith(f".{entries[0]}") for name, _ in model.named_parameters()):
            return config
        config.target_parameters = entries
    linear = [path for path, module in named_base_modules(model) if features(base_of(module))]
    config.target_modules = {name for name in names if any(path.endswith(f".{name}") for path in linear)}
    if config.feedforward_modules is None:
        config.feedforward_modules = config.target_modules & {DOWN}
    warnings.warn(
        f"target_modules is not set, and PEFT has no defaults for {model_type(model)} that reach its experts: it is "
        f"set to {sorted(config.target_modules)}, and target_parameters to {config.target_parameters}.",
        stacklevel=4,
    )
    return config


def matched_parameters(model: nn.Module, entries: list[str], config: IA3Config, strict: bool) -> list[Target]:
    """Return the parameters whose names equal an entry or end with ``.entry``.

    Raises :class:`IA3Error` for entries without parameters and, by their names, for parameters that cannot be scaled.
    """
    found: list[Target] = []
    known: dict[str, None] = {}  # ends of names, in the model's order
    met: set[str] = set()
    wrappers: dict[int, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            wrappers[id(module.base_layer)] = module
        wrapper = wrappers.get(id(module))
        for name, parameter in module._parameters.items():
            key = f"{path if wrapper is None else path.removesuffix('.base_layer')}.{name}"
            if parameter is None or not path or ".ia3_l." in key:
                continue
            why = _obstacle(module, name, parameter)
            if why is None:
                known[".".join(key.split(".")[-2:])] = None
            means = {entry for entry in entries if key == entry or key.endswith(f".{entry}")}
            met |= means
            if not means or is_excluded(key, config):
                continue
            if why is not None:
                raise IA3Error(f"target_parameters matches {key!r}, {why}.")
            there = None if wrapper is None else wrapper._modules.get(name)
            found.append(Target(key, there or ExpertsMatrix(module, name), name == DOWN))
    missing = sorted(set(entries) - met)
    if missing and (strict or not met):
        raise IA3Error(
            f"target_parameters names {', '.join(map(repr, missing))}, and this {type(model).__name__} has no such "
            f"parameter; experts' parameters in it are {', '.join(map(repr, known)) or 'none'}: correct the name."
        )
    return found


def _obstacle(module: Any, name: str, parameter: Any) -> str | None:
    """Return why vectors cannot scale a parameter, as the end of a sentence; ``None`` where they can."""
    kind = type(module).__name__
    if parameter.dim() != 3:
        return (
            f"a parameter of shape {list(parameter.shape)}; expected one of experts, [experts, ., .]: name linear "
            "layers in target_modules"
        )
    is_blockwise = kind in BLOCKWISE
    if not is_blockwise and not all(hasattr(module, attribute) for attribute in _REGISTERED):
        return f"part of a {kind}, whose layout is not known here; leave it out"
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if name not in (up, DOWN):
        return f"which is not what vectors scale in a {kind}; name {up} or {DOWN}"
    is_sharded = getattr(module, "_is_expert_parallel", False) or parameter.shape[0] != module.num_experts
    if is_sharded or hasattr(parameter, "full_tensor"):
        return "which is sharded over processes; load it without expert and tensor parallelism, and shard it afterwards"
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        return f"which is quantized ({str(parameter.dtype).removeprefix('torch.')}); load the model unquantized"
    if not is_blockwise:
        implementation_of(module)
    return None
