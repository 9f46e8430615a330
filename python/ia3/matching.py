"""Which modules a configuration means: PEFT's rules, and sentences where they lead nowhere."""

from __future__ import annotations

import copy
import difflib
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peft import TaskType
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import IA3Config, fullmatch
from .errors import IA3Error
from .patching import execution_device
from .probing import CONVOLUTIONS, base_of, features, is_scaled, model_type, named_base_modules, reader_of

ALL_LINEAR = "all-linear"
# The heads that belong to a task; a model has one of them.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


@dataclass(frozen=True)
class Target:
    """A module to be scaled: its name in the model, the module, and the side of the vector."""

    path: str
    module: nn.Module
    is_feedforward: bool


@dataclass(frozen=True)
class Plan:
    """Everything that one adapter will touch, found before anything is touched."""

    config: IA3Config  # a copy of the user's, with the defaults and the heads filled in
    targets: tuple[Target, ...]
    saved: tuple[tuple[str, nn.Module], ...]  # modules_to_save, by name

    def exact_config(self) -> IA3Config:
        """Return a configuration by which PEFT finds these targets, and no others."""
        config = copy.deepcopy(self.config)
        config.target_modules = _any_of(target.path for target in self.targets)
        config.feedforward_modules = _any_of(target.path for target in self.targets if target.is_feedforward)
        config.exclude_modules = config.target_parameters = None
        return config


def _any_of(paths: Iterable[str]) -> str:
    """Return a regular expression that these names match, from their first to their last character."""
    return "|".join(map(re.escape, paths)) or "(?!)"


def _endings(path: str) -> Iterator[str]:
    """Yield the entries of a list that mean a module of this name."""
    yield path
    for place, letter in enumerate(path):
        if letter == ".":
            yield path[place + 1 :]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"{name!r:.200}" for name in names)


def _linear_names(modules: dict[str, nn.Module]) -> list[str]:
    """Return the last components of the linear layers' names, each once, in the model's order."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path, module in modules.items() if features(module)))


def _suggestion(model: nn.Module, modules: dict[str, nn.Module], wanted: Iterable[str]) -> str:
    """Return what to do about names that the model lacks."""
    own = ((name, parameter) for name, parameter in model.named_parameters() if ".ia3_l." not in name)
    fused = [name for name, parameter in own if parameter.dim() == 3 and "expert" in name]
    if fused:
        return (
            f"its experts are fused into three-dimensional parameters ({fused[0]!r} and others), which have no module "
            "to scale: name them in target_parameters, and in target_modules linear layers, of which there are "
            f"{_quoted(_linear_names(modules))}"
        )
    linear = _linear_names(modules)
    endings = [".".join(path.split(".")[-2:]) for path, module in modules.items() if features(module)]
    near: dict[str, None] = {}
    for name in itertools.islice(wanted, 10):  # each is compared with every layer's name
        candidates = list(dict.fromkeys(endings)) if "." in name else linear
        near.update(dict.fromkeys(difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)))
    if near:
        return f"did you mean {_quoted(near)} (its linear layers are named {_quoted(linear)})"
    return f"use names of its linear layers: {_quoted(linear)}"


def _unknown_names(field: str, names: Iterable[str], model: nn.Module, modules: dict[str, nn.Module]) -> IA3Error:
    names = sorted(names)
    return IA3Error(
        f"{field} names {_quoted(names)}, which {'matches' if len(names) == 1 else 'match'} no module of this "
        f"{type(model).__name__}; {_suggestion(model, modules, names)}."
    )


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], config: IA3Config) -> list[str]:
    """Return every linear layer but the output layer."""
    getter: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = getter()
    if output is None and config.task_type == TaskType.SEQ_CLS:
        output = next((getattr(model, name) for name in TASK_HEADS[TaskType.SEQ_CLS] if hasattr(model, name)), None)
    return [
        path
        for path, module in modules.items()
        if features(base := base_of(module)) is not None and not isinstance(base, CONVOLUTIONS)
        if module is not output and reader_of(model, path) is None
    ]


def _matched_targets(model: nn.Module, modules: dict[str, nn.Module], config: IA3Config, strict: bool) -> list[str]:
    """Return the names that ``target_modules`` matches, before exclusion."""
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            found = _all_linear(model, modules, config)
            if not found:
                raise IA3Error(
                    f"target_modules is {targets!r}, but this {type(model).__name__} has no linear layer beside its "
                    "output layer that is called as one; name the modules to scale."
                )
            return found
        matched = [path for path in modules if fullmatch(targets, path)]
        if not matched:
            raise IA3Error(
                f"target_modules is the regular expression {targets!r:.200}, which matches no module of this "
                f"{type(model).__name__} from its first to its last character; "
                f"{_suggestion(model, modules, [targets])}."
            )
        return matched
    entries = targets or set()
    matched = [path for path in modules if not entries.isdisjoint(_endings(path))]
    missing = entries - {ending for path in matched for ending in _endings(path)}
    if not entries and config.target_parameters:
        return []
    if not entries:
        raise IA3Error(f"target_modules is empty; {_suggestion(model, modules, ())}.")
    if missing and (strict or not matched):
        raise _unknown_names("target_modules", missing, model, modules)
    return matched


def is_excluded(path: str, config: IA3Config) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if fullmatch(excluded, path):
            return True
    elif excluded and not excluded.isdisjoint(_endings(path)):
        return True
    # A module that is trained whole has no use for vectors, nor has anything inside it.
    return any(f".{name}." in f".{path}." for name in config.modules_to_save or ())


def is_feedforward(path: str, feedforward: set[str] | list[str] | str | None) -> bool:
    """Return whether ``feedforward_modules`` means the module of this name, whose input is scaled then."""
    if isinstance(feedforward, str):
        return fullmatch(feedforward, path)
    return path.endswith(tuple(feedforward or ()))


def _with_defaults(model: nn.Module, config: IA3Config) -> IA3Config:
    """Return a copy with the default targets of the model's type and the heads of the task filled in."""
    config = copy.deepcopy(config)
    kind = model_type(model)
    known = TARGETS.get(kind)
    if config.target_modules is None:
        if known is None:
            raise IA3Error(
                f"target_modules is not set, and there are no defaults for the model type {kind!r}; set target_modules "
                "and feedforward_modules."
            )
        config.target_modules = set(known)
    if config.feedforward_modules is None:
        if known is None:
            raise IA3Error(
                f"feedforward_modules is not set, and there are no defaults for the model type {kind!r}; name the "
                "targets whose input is to be scaled, or pass [] for none."
            )
        config.feedforward_modules = set(FEEDFORWARD.get(kind, ()))
    if config.task_type in TASK_HEADS:
        names = config.modules_to_save or []
        heads = TASK_HEADS[TaskType(config.task_type)]
        config.modules_to_save = [*names, *(name for name in heads if name not in names)]
    return config


def _storable_feedforward(config: IA3Config, paths: list[str]) -> set[str] | str:
    """Return the default feed-forward names in a form that may be saved beside an explicit list of targets.

    A list has to be a subset of ``target_modules``; where the targets that are meant cannot be told apart by their
    entries, a regular expression says the same.
    """
    defaults, targets = config.feedforward_modules, config.target_modules
    if not isinstance(defaults, set) or not isinstance(targets, set) or defaults <= targets:
        stored: set[str] | str = defaults
        return stored
    subset = {entry for entry in targets if is_feedforward(entry, defaults)}
    if all(is_feedforward(path, defaults) == is_feedforward(path, subset) for path in paths):
        return subset
    return f".*({'|'.join(re.escape(name) for name in sorted(defaults))})"


def _saved_modules(model: nn.Module, config: IA3Config, explicit: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """Return the modules that ``modules_to_save`` means: those whose names end with an entry."""
    entries = config.modules_to_save or []
    found: list[tuple[str, nn.Module]] = []
    for path, module in named_base_modules(model):
        is_inside = any(path.startswith(outer + ".") for outer, _ in found)
        if not is_inside and path.endswith(tuple(entries)):
            found.append((path, module))
    for path, module in found:
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            raise IA3Error(
                f"modules_to_save means {path!r}, a {type(module).__name__}, which is never called and cannot be "
                "trained as one; name the modules in it."
            )
        if any(execution_device(part) is not None for part in module.modules()):
            raise IA3Error(
                f"modules_to_save means {path!r}, whose weights are offloaded, so that there is nothing to copy and "
                "train; give it a device in device_map."
            )
    missing = sorted(entry for entry in explicit if not any(path.endswith(entry) for path, _ in found))
    if missing:
        names = [name for name, _ in model.named_children()]
        raise IA3Error(
            f"modules_to_save names {_quoted(missing)}, which this {type(model).__name__} lacks; the modules at its "
            f"top are {_quoted(names)}: correct the name."
        )
    return found


def plan_modules(model: nn.Module, config: IA3Config, *, strict: bool = True) -> Plan:
    """Find what ``config`` means in ``model`` without changing either.

    strict: every entry of a list must match something. Loading a saved adapter is not strict: PEFT saves
    configurations with entries that match nothing, and the tensors in the file decide then.

    Raises :class:`IA3Error` for names that the model lacks (with near ones), for layers of an unsupported kind, and
    where nothing is left to scale.
    """
    found = dict(named_base_modules(model))
    # The layers that hold experts' vectors are no modules of the model's.
    modules = {path: one for path, one in found.items() if not is_scaled(one) or features(base_of(one)) is not None}
    explicit_feedforward = config.feedforward_modules
    # A model has one of its task's heads; naming the others too is what a saved configuration does.
    heads = TASK_HEADS.get(config.task_type, ())
    explicit_saved = [name for name in config.modules_to_save or () if strict and name not in heads]
    config = _with_defaults(model, config)
    matched = _matched_targets(model, modules, config, strict)
    paths = [path for path in matched if not is_excluded(path, config)]
    if not paths and not config.target_parameters:
        raise IA3Error(
            f"nothing is left to scale: exclude_modules and modules_to_save take out all {len(matched)} modules that "
            "target_modules matches; narrow them."
        )
    if explicit_feedforward is None:
        config.feedforward_modules = _storable_feedforward(config, paths)
    else:
        _check_feedforward(model, modules, config, paths, strict)
    targets = tuple(Target(path, modules[path], is_feedforward(path, config.feedforward_modules)) for path in paths)
    for target in targets:
        if not is_scaled(target.module) and features(target.module) is None:
            if isinstance(target.module, nn.Linear):
                raise IA3Error(
                    f"target_modules matches {target.path!r}, a {type(target.module).__name__}, which is built on a "
                    "linear layer and computes something else; name it in exclude_modules."
                )
            raise IA3Error(
                f"target_modules matches {target.path!r}, which is a {type(target.module).__name__}; only linear "
                "layers and two- and three-dimensional convolutions can be scaled: "
                f"{_suggestion(model, modules, [target.path.rpartition('.')[2]])}."
            )
        reader = reader_of(model, target.path)
        if reader is not None:
            raise IA3Error(
                f"target_modules matches {target.path!r}, whose weight the {reader} around it reads without calling "
                "the layer, so that its vector would have no effect; name it in exclude_modules."
            )
        if is_scaled(target.module) and target.module.is_feedforward != target.is_feedforward:
            raise IA3Error(
                f"{target.path!r} already scales its {'input' if target.module.is_feedforward else 'output'} for "
                "another adapter, and this one asks for the other side; make feedforward_modules agree."
            )
    config.fan_in_fan_out = _corrected_fan_in_fan_out(config, targets)
    return Plan(config, targets, tuple(_saved_modules(model, config, explicit_saved)))


def _check_feedforward(
    model: nn.Module, modules: dict[str, nn.Module], config: IA3Config, paths: list[str], strict: bool
) -> None:
    """Entries that a user wrote have to mean something."""
    feedforward = config.feedforward_modules
    if isinstance(feedforward, str):
        if not any(is_feedforward(path, feedforward) for path in paths):
            warnings.warn(
                f"feedforward_modules is the regular expression {feedforward!r:.200}, which matches none of the "
                f"{len(paths)} targets; all of them scale their outputs.",
                stacklevel=4,
            )
    elif strict:
        missing = [entry for entry in feedforward or () if not any(path.endswith(entry) for path in modules)]
        if missing:
            raise _unknown_names("feedforward_modules", missing, model, modules)


def _corrected_fan_in_fan_out(config: IA3Config, targets: tuple[Target, ...]) -> bool:
    """Return whether weights are stored ``[in, out]``; warns where the configuration says otherwise."""
    bases = [base_of(target.module) for target in targets]
    has_conv1d = any(isinstance(base, Conv1D) for base in bases)
    if config.fan_in_fan_out != has_conv1d:
        kinds = sorted({type(base).__name__ for base in bases})
        warnings.warn(
            f"fan_in_fan_out is {config.fan_in_fan_out}, but the targets are {' and '.join(kinds)} layers; it is set "
            f"to {has_conv1d}.",
            stacklevel=4,
        )
    return has_conv1d
