"""Experts whose weights are three-dimensional parameters: which of them vectors can scale, and the computation.

transformers computes experts in functions that its registry knows by name (``experts_implementation``), and that call
the experts' own ``_apply_gate`` between the two products. They run as they are, on a view of the experts whose
``_apply_gate`` multiplies by each row's vector: what is biased, interleaved or clamped stays so.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.integrations import moe

from ia3_kernels import gated_activation, scaled_activation

from . import matching, patching
from .blocks import activation_name
from .checkpoint import KEY_PREFIX, WEIGHTS_NAME, read_tensors
from .config import IA3Config
from .errors import IA3Error
from .layers import Wrapper, effective_scale, is_untouched, refuse_training
from .matching import Plan, Target, is_excluded, model_type
from .probing import base_of, features

DOWN = "down_proj"
# The layers beside the experts that a model type's default targets are; a down projection where it has linear ones.
_SPLIT = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "llama4_text")
_LINEAR = {
    **dict.fromkeys(_SPLIT, ("k_proj", "v_proj", DOWN)),
    "deepseek_v2": ("kv_b_proj", DOWN),
    "deepseek_v3": ("kv_b_proj", DOWN),
}
# Implementations whose order of rows is known here.
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# Experts that get a block of rows each, [experts * tokens, hidden], and run in no implementation of the registry.
_BLOCKWISE = frozenset({"Llama4TextExperts"})
_REGISTERED = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate", "config")
_OLD_KEY = re.compile(r"\.experts\.(\d{1,9})\..*\.ia3_l$")

Scales = Mapping[str, tuple[Tensor, Tensor | None]]


class _Renamed(dict[str, Any]):
    """The parameters of an experts module under a layer's names."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        self.experts, self.names = experts, {"weight": name, "bias": f"{name}_bias"}

    def __contains__(self, key: object) -> bool:
        return self.names.get(str(key)) in self.experts._parameters

    def __getitem__(self, key: str) -> Any:
        return self.experts._parameters[self.names[key]]

    def get(self, key: str, default: Any = None) -> Any:
        return self.experts._parameters.get(self.names[key], default)

    def __setitem__(self, key: str, value: Any) -> None:
        self.experts._parameters[self.names[key]] = value


class ExpertsMatrix(nn.Module):
    """One parameter of an experts module as the layer that vectors scale: its ``weight`` ``[experts, ., .]``, ``bias``.

    is_input: its vectors scale inputs, ``[experts, 1, n]`` (the down projection); else outputs, ``[experts, n, 1]``.
    dim: what a vector scales of the weight as :meth:`as_stored` shows it: 0, the rows; 1, the columns of each group.
    """

    def __init__(self, experts: Any, name: str) -> None:
        super().__init__()
        self.experts: Any
        self.__dict__["experts"] = experts  # not a child: it stands in the model already
        self.__dict__["_parameters"] = _Renamed(experts, name)
        self.is_input = name == DOWN
        is_transposed = getattr(experts, "is_transposed", True)
        count, *sides = experts._parameters[name].shape
        size = sides[0 if self.is_input == is_transposed else 1]
        self.vector_shape = (count, 1, size) if self.is_input else (count, size, 1)
        self.in_features = self.out_features = count * size
        self.dim = int(self.is_input != is_transposed)

    def as_stored(self, parameter: Tensor) -> Tensor:
        """Return a view of the weight as that of a grouped convolution, a group for each expert; of a bias, flat."""
        values = parameter.detach()
        return values.view(-1, values.shape[-1], 1) if values.dim() == 3 else values.view(-1)

    def runs(self) -> tuple[str, str]:
        """Return the operator that multiplies by the vectors, and why it is that one."""
        kind = type(self.experts).__name__
        if not self.is_input:
            return "scaled_activation", f"on the product of {kind}"
        if _kernel_activation(self.experts) is None:
            return "scaled_activation", f"{kind} computes its own gate"
        has_gate = getattr(self.experts, "has_gate", True)
        return "gated_activation" if has_gate else "scaled_activation", f"fused into the activation of {kind}"


class Experts(Wrapper):
    """Experts (``base_layer``) and, under the names of their parameters, the layers that hold the vectors."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = experts
        self.training = experts.training

    def layers(self) -> dict[str, Any]:
        """Return what holds the vectors, by the names of the parameters."""
        return {name: layer for name, layer in self._modules.items() if name != "base_layer"}

    def forward(self, *args: Any, **named: Any) -> Any:
        x: Tensor = args[0] if args else next(iter(named.values()))
        if type(self.base_layer).__name__ in _BLOCKWISE:
            x = x[: x.shape[0] // self.base_layer.num_experts]  # the first expert's block: every token once
        scales = {}
        for name, layer in self.layers().items():
            scale, index = effective_scale(layer, x)
            if scale is not None:
                scales[name] = scale, index
        y = self.base_layer(*args, scales=scales, **named) if scales else self.base_layer(*args, **named)
        for layer in self.layers().values():
            y = refuse_training(layer, y)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with ExitStack() as unmerged:  # as layers do it for weights inside of them
            for layer in self.layers().values():
                unmerged.enter_context(layer.unmerged())
            return super()._apply(fn, recurse)


# --- the computation ------------------------------------------------------------------------------------------------


class _View:
    """Experts whose activation between the two products is another function; everything else is theirs."""

    def __init__(self, experts: Any, activate: Callable[[Tensor], Tensor]) -> None:
        self.experts = experts
        self._apply_gate = self.act_fn = activate

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


def experts_forward(experts: Any, *args: Any, scales: Any = None, **named: Any) -> Any:
    """Compute what the class of ``experts`` does, each row's activations multiplied by its expert's vector.

    scales: by parameter ``[experts, n]`` with None, or ``[adapters, experts * n]`` with each token's adapter
        ``[tokens]``; None: nothing.
    """
    if scales is None:
        return type(experts).forward(experts, *args, **named)
    inputs, count = (*args, *named.values()), experts.num_experts
    tokens: Tensor | None = None
    if type(experts).__name__ in _BLOCKWISE:
        x = inputs[0].view(count, -1, inputs[0].shape[-1])
        ids = torch.arange(count, dtype=torch.int32, device=x.device).repeat_interleave(x.shape[1])
        tokens = torch.arange(x.shape[1], device=x.device).repeat(count)
        hidden = _activate(experts, scales, ids, tokens, torch.bmm(x, experts.gate_up_proj).flatten(0, 1))
        return torch.bmm(hidden.view(count, x.shape[1], -1), experts.down_proj).flatten(0, 1)
    name, index = _implementation(experts), inputs[1]
    # The order of the implementation's rows: by token, or sorted by expert as the registry's function sorts them.
    ids = index.reshape(-1)
    ids, order = (ids, None) if name == "batched_mm" else ids.sort()
    ids = ids.to(torch.int32)
    if any(adapter is not None for _, adapter in scales.values()):
        order = torch.arange(len(ids), device=ids.device) if order is None else order
        tokens = order // index.shape[-1]
    view = _View(experts, lambda rows: _activate(experts, scales, ids, tokens, rows))
    if name == "eager":
        return _one_by_one(view, *inputs[:3], ids, order)  # type: ignore[call-arg]
    return moe.ALL_EXPERTS_FUNCTIONS[name](view, *inputs)


def _activate(experts: Any, scales: Scales, ids: Tensor, tokens: Tensor | None, rows: Tensor) -> Tensor:
    """Compute the input of the down projection from the up projection's output ``rows [S, n]``, scaled on both sides.

    ids, tokens: each row's expert and, where rows have adapters of their own, token, ``[S]``.
    """

    def scale_of(name: str) -> tuple[Tensor | None, Tensor | None]:
        if name not in scales:
            return None, None
        scale, adapter = scales[name]
        entries = scale.numel() if adapter is None else scale.shape[1]
        matrix = scale.reshape(-1, entries // experts.num_experts)
        if adapter is None:
            return matrix, ids
        chosen = adapter[tokens]
        return matrix, torch.where(chosen < 0, chosen, chosen * experts.num_experts + ids)

    has_gate = getattr(experts, "has_gate", True)
    out, index = scale_of("gate_up_proj" if has_gate else "up_proj")
    if out is not None:
        rows = scaled_activation(rows, out, "identity", index)
    scale, index = scale_of(DOWN)
    activation = _kernel_activation(experts)
    if activation is None:
        hidden: Tensor = experts._apply_gate(rows) if has_gate else experts.act_fn(rows)
        return hidden if scale is None else scaled_activation(hidden, scale, "identity", index)
    if has_gate:
        gate, up = rows.chunk(2, dim=-1)
        return gated_activation(gate, up, scale, activation, index)
    return scaled_activation(rows, scale, activation, index)


def _kernel_activation(experts: Any) -> str | None:
    """Return the kernels' name of the activation; None where it is another, or the gate computes something else."""
    gate = getattr(type(experts), "_apply_gate", None)
    is_plain = gate is None or (gate.__module__ == moe.__name__ and "_apply_gate" not in experts.__dict__)
    activation = getattr(experts, "act_fn", None)
    if not is_plain or (isinstance(activation, nn.Module) and not is_untouched(activation)):
        return None
    return activation_name(activation)


def _one_by_one(view: Any, x: Tensor, index: Tensor, weights: Tensor, ids: Tensor, order: Tensor) -> Tensor:
    """Compute the experts one after the other; what an implementation in the registry takes, and its sorted rows."""
    counts = torch.bincount(ids, minlength=view.num_experts).tolist()

    def project(rows: Tensor, name: str) -> Tensor:
        matrices, parts = getattr(view, name), []
        for expert, part in enumerate(rows.split(counts)):
            matrix = matrices[expert] if view.is_transposed else matrices[expert].t()
            bias = getattr(view, f"{name}_bias")[expert] if view.has_bias else None
            if part.shape[0]:
                parts.append(part @ matrix if bias is None else torch.addmm(bias, part, matrix))
        return torch.cat(parts) if parts else rows.new_zeros(0, matrix.shape[1])

    hidden = view._apply_gate(project(x[order // index.shape[-1]], "gate_up_proj" if view.has_gate else "up_proj"))
    y = project(hidden, DOWN)
    if getattr(view, "has_post_expert_norm", False):
        y = view.post_expert_norm(y)
    y = y * weights.reshape(-1)[order, None]
    return y[order.argsort()].view(*index.shape, -1).sum(1).to(x.dtype)


def _implementation(experts: Any) -> str:
    name = getattr(experts.config, "_experts_implementation", None) or "eager"
    if name not in _IMPLEMENTATIONS:
        raise IA3Error(
            f"experts_implementation is {name!r}, whose order of rows is not known here; load the model with one of "
            f"{', '.join(_IMPLEMENTATIONS)}, or call its set_experts_implementation."
        )
    return str(name)


def patch(model: nn.Module) -> None:
    """Let the experts of ``model`` that have vectors run :func:`experts_forward`."""
    for module in model.modules():
        if isinstance(module, Experts) and not patching.is_replaced(module.base_layer):
            patching.replace(module.base_layer, experts_forward)


def give_back(model: nn.Module) -> None:
    """Undo :func:`patch`."""
    for module in model.modules():
        if isinstance(module, Experts):
            patching.restore(module.base_layer, (experts_forward,))


def has_vectors(model: nn.Module) -> bool:
    """Return whether experts of ``model`` have vectors."""
    return any(isinstance(module, Experts) for module in model.modules())


def wrap(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer``, which is to hold the vectors of the experts' parameter ``path``, where it belongs."""
    outer, _, name = path.rpartition(".")
    experts = model.get_submodule(outer)
    if not isinstance(experts, Experts):
        experts = Experts(experts)
        model.set_submodule(outer, experts)
    experts._modules[name] = layer  # add_module finds a parameter of this name in what the experts pass on


def unwrap(model: nn.Module) -> None:
    """Put experts back in the place of those with vectors."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(path, module.base_layer)


# --- what a configuration means -------------------------------------------------------------------------------------


def plan_adapter(model: nn.Module, config: IA3Config, *, strict: bool = True) -> Plan:
    """Find what ``config`` means in ``model``, as :func:`ia3.matching.plan_adapter`, ``target_parameters`` included."""
    config = _with_defaults(model, config)
    entries = config.target_parameters
    if not entries:
        return matching.plan_adapter(model, config, strict=strict)
    own = matched_parameters(model, entries, config, strict)
    # Feed-forward entries that mean parameters are those that the last lines here have written.
    modules, feedforward = config.target_modules, config.feedforward_modules
    if isinstance(feedforward, set):
        feedforward = {entry for entry in feedforward if not _means(entry, entries) or entry in (modules or ())}
    if modules is None and model_type(model) not in matching.TARGETS:
        config.target_modules = modules = set()
    config.feedforward_modules = set() if not modules and modules is not None else feedforward
    plan = matching.plan_adapter(model, config, strict=strict)
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
    linear = [path for path, module in matching.named_base_modules(model) if features(base_of(module))]
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
    is_blockwise = kind in _BLOCKWISE
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
        _implementation(module)
    return None


# --- files of separate experts --------------------------------------------------------------------------------------


@contextmanager
def readable(model: nn.Module, folder: Path, config: IA3Config) -> Iterator[tuple[Path, IA3Config]]:
    """Yield the folder of an adapter, or a copy, and its configuration, both in terms of experts that are parameters.

    Older adapters have a vector for each of the experts, which were modules.
    """
    has_stacks = any(parameter.dim() == 3 for parameter in model.parameters())
    changed, names, parameters = stacked(model, read_tensors(folder) if has_stacks else {})
    if not parameters:
        yield folder, config
        return
    config = copy.deepcopy(config)
    config.target_parameters = sorted({*(config.target_parameters or ()), *parameters})
    for field in ("target_modules", "feedforward_modules"):
        value = getattr(config, field)
        if isinstance(value, set):
            old = {entry for entry in value if any(f".{name}".endswith(f".{entry}") for name in names)}
            setattr(config, field, value - old)
    with TemporaryDirectory() as scratch:
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, Path(scratch) / WEIGHTS_NAME)
        yield Path(scratch), config


def stacked(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str], set[str]]:
    """Return an adapter's tensors with those of separate experts put together as transformers does with weights.

    Also the names of the layers that were, and of the parameters that are. Raises :class:`IA3Error` where some of a
    layer's experts have none.
    """
    names: set[str] = set()
    parameters: set[str] = set()
    parts: dict[str, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    rest = dict(tensors)
    if not any(_OLD_KEY.search(key) for key in tensors) or not hasattr(getattr(model, "config", None), "model_type"):
        return rest, names, parameters
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    order = {pattern: list(rule.source_patterns) for rule in converters for pattern in rule.source_patterns}
    places = dict(model.named_parameters())
    for key in tensors:
        match = _OLD_KEY.search(key)
        layer = key.removeprefix(KEY_PREFIX).removesuffix(".ia3_l")
        name, pattern = rename_source_key(f"{layer}.weight", renamings, converters)
        name = name.replace(".experts.", ".experts.base_layer.") if name not in places else name
        if match is not None and pattern is not None and name in places:
            parts[name][pattern][int(match[1])] = rest.pop(key)
            names.add(layer)
    for name, by_pattern in parts.items():
        count, columns = places[name].shape[0], []
        for pattern in order[next(iter(by_pattern))]:
            missing = [expert for expert in range(count) if expert not in by_pattern[pattern]]
            if missing:
                raise IA3Error(
                    f"the adapter has no vector for expert {missing[0]} of {name!r} ({pattern.strip('.')}), and has "
                    "some for others; save it again with vectors for all of them."
                )
            columns.append(torch.stack([by_pattern[pattern][expert] for expert in range(count)]))
        name = name.replace(".base_layer", "")
        rest[f"{KEY_PREFIX}{name}.ia3_l"] = torch.cat(columns, 1)
        parameters.add(".".join(name.split(".")[-2:]))
    return rest, names, parameters
