"""An adapter's files, read whole before anything is changed: PEFT's format, in sentences where it is not kept."""

from __future__ import annotations

import copy
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ia3_kernels.target import host_memory

from .errors import IA3Error, reason_of
from .files import read_bytes
from .layers import ScaledLayer
from .probing import base_of, carriers, features, is_scaled, named_base_modules

if TYPE_CHECKING:
    from .config import IA3Config
    from .matching import Plan

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
# Of 44,000 experts' vectors it has 7 MB; empty tensors without end take time, and nothing else.
_LONGEST_HEADER = 16 << 20
# What stands before a module's name in a file: a PeftModel's path to the base model.
KEY_PREFIX = "base_model.model."
# What torch.compile puts before the names in a model that it wraps.
COMPILED = "_orig_mod."
_OLD_EXPERT = re.compile(r"\.experts\.(\d{1,9})\..*\.ia3_l$")


def vector_shape(layer: nn.Module, is_feedforward: bool) -> tuple[int, ...]:
    """Return the shape of one adapter's vector for a layer, as PEFT stores it."""
    base: Any = base_of(layer)
    own: tuple[int, ...] | None = base.__dict__.get("vector_shape")
    if own is not None:
        return own
    sizes = features(base)
    assert sizes is not None
    size = sizes[0] if is_feedforward else sizes[1]
    if isinstance(base, nn.Conv2d | nn.Conv3d):
        return (1, size, *(1,) * (base.weight.dim() - 2))
    return (1, size) if is_feedforward else (size, 1)


def expected_tensors(plan: Plan) -> dict[str, Tensor]:
    """Return what a file for this plan holds: tensors of the right shapes and kinds, whose values mean nothing."""
    expected: dict[str, Tensor] = {}
    for target in plan.targets:
        shape = vector_shape(target.module, target.is_feedforward)
        expected[f"{KEY_PREFIX}{target.path}.ia3_l"] = torch.empty(shape, device="meta")
    for path, module in plan.saved:
        original = getattr(module, "original_module", module)
        expected.update({f"{KEY_PREFIX}{path}.{name}": value for name, value in original.state_dict().items()})
    return expected


def present_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter that the base model ``model`` has, by their keys in a file."""
    tensors: dict[str, Tensor] = {}
    for path, carrier in carriers(model):
        if is_scaled(carrier):
            if adapter_name in carrier.ia3_l:
                tensors[f"{KEY_PREFIX}{path}.ia3_l"] = carrier.ia3_l[adapter_name]
        elif adapter_name in carrier.modules_to_save:
            for name, value in carrier.modules_to_save[adapter_name].state_dict(keep_vars=True).items():
                tensors[f"{KEY_PREFIX}{path}.{name}"] = value
    return tensors


def embeddings_of(model: nn.Module) -> list[nn.Module | None]:
    """Return the input and the output embeddings of a transformers model."""
    found: list[nn.Module | None] = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name, lambda: None)())
        except NotImplementedError:  # a model without
            found.append(None)
    return found


def check_embeddings_unmerged(model: nn.Module) -> None:
    """Raise :class:`IA3Error` where embeddings that are to be saved hold vectors."""
    for embedding in embeddings_of(model):
        if isinstance(embedding, ScaledLayer) and embedding.merged_adapters:
            raise IA3Error(
                f"{', '.join(embedding.merged_adapters)} is merged into the embeddings, which were to be saved; "
                "unmerge_adapter first, or leave save_embedding_layers out."
            )


def embedding_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the input and output embeddings, by their keys in a file; a file may hold them, or not."""
    wanted = embeddings_of(model)
    return {
        f"{KEY_PREFIX}{path}.{name}": value
        for path, module in named_base_modules(model)
        if any(module is embedding for embedding in wanted)
        for name, value in module.state_dict(keep_vars=True).items()
    }


def read_tensors(folder: Path, key_mapping: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter. Only safetensors: a pickle can run any code. Raises :class:`IA3Error`.

    key_mapping: regular expressions and what to put in their place, applied in turn to keys without their prefix.
    """
    path = folder / WEIGHTS_NAME
    if not os.path.lexists(path):
        if os.path.lexists(folder / PICKLE_NAME):
            raise IA3Error(
                f"{folder / PICKLE_NAME} is a pickle, which can run any code when it is read; save the adapter again "
                f"with safe_serialization=True, as {WEIGHTS_NAME}."
            )
        raise IA3Error(f"there is no {WEIGHTS_NAME} in {folder}; name the local folder of a saved adapter.")
    data = read_bytes(path, host_memory() // 2, "name the folder of a saved adapter")
    check_header(path, data[:8], len(data))
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        why = _damage(data) or reason_of(error)
        raise IA3Error(f"{path} is damaged: {why}; copy or save the adapter again.") from None
    # PEFT reads names that still hold their adapter's, too.
    count = len(tensors)
    tensors = {re.sub(r"\.ia3_l\.[^.]+$", ".ia3_l", name): tensor for name, tensor in tensors.items()}
    for pattern, replacement in (key_mapping or {}).items():
        tensors = {
            KEY_PREFIX + re.sub(pattern, replacement, name.removeprefix(KEY_PREFIX)): tensor
            for name, tensor in tensors.items()
        }
    if len(tensors) < count:
        raise IA3Error(f"{path} has two tensors for one place; save each adapter to a folder of its own.")
    check_values({name: tensor for name, tensor in tensors.items() if name.endswith(".ia3_l")}, path)
    return tensors


def check_header(path: Path, start: bytes, size: int) -> None:
    """Raise :class:`IA3Error` for a safetensors file of ``size`` bytes of more tensors than any model has.

    start: its first eight bytes.
    """
    length = int.from_bytes(start, "little")
    if _LONGEST_HEADER < length <= size:
        raise IA3Error(f"{path} has a header of {length:,} bytes, and {_LONGEST_HEADER:,} at most; get it again.")


def check_values(vectors: Mapping[str, Tensor], source: Path | str) -> None:
    """Raise :class:`IA3Error` for vectors that are no floating-point numbers, or not finite as the fp32 they become."""
    for name, vector in vectors.items():
        if not vector.is_floating_point():
            raise IA3Error(
                f"{source} has the tensor {name!r:.200} with dtype {vector.dtype}, and vectors are floating-point "
                "numbers; save the adapter again."
            )
        # numpy's, of one thread: waking the others costs more, and a server's are busy.
        if not vector.is_meta and not np.isfinite(vector.detach().to("cpu", torch.float32).numpy()).all():
            raise IA3Error(
                f"{source} has values that are not finite in {name!r:.200}; train the adapter again, with a smaller "
                "learning rate."
            )


def _damage(data: bytes) -> str | None:
    """Return which tensor a file cut short lacks, told from its header; ``None`` where the header says nothing."""
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < max(start, 8):
        return f"it ends after {len(data)} bytes, inside its header"
    try:
        entries = json.loads(data[8:start])
        ends = {name: start + entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"}
        cut = sorted((end, name) for name, end in ends.items() if end > len(data))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
    return f"it ends after {len(data)} bytes, inside the tensor {cut[0][1]!r:.200}" if cut else None


def fitting_names(model: nn.Module, names: Iterable[str], places: Iterable[str]) -> dict[str, str]:
    """Return the place of each of a file's names where the two differ by what is known to rename modules.

    A wrapper of torch.compile puts a prefix before them, and transformers renames some between releases.
    """
    by_plain_name = {place.replace(COMPILED, ""): place for place in places}
    found: dict[str, str] = {}
    for name in names:
        plain = name.replace(COMPILED, "")
        place = by_plain_name.get(plain) or by_plain_name.get(_renamed(model, plain))
        if place is not None and place != name:
            found[name] = place
    return found


def _renamed(model: nn.Module, name: str) -> str:
    """Return the name that this release of transformers has for a module's tensor of an older one."""
    key = name.removeprefix(KEY_PREFIX)
    for pattern, replacement in (getattr(model, "_checkpoint_conversion_mapping", None) or {}).items():
        key, count = re.subn(pattern, replacement, key)
        if count:
            return KEY_PREFIX + key
    if not hasattr(getattr(model, "config", None), "model_type"):
        return name
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    renamed: str = rename_source_key(key, renamings, [])[0]
    return KEY_PREFIX + renamed


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    optional: Mapping[str, Tensor],
    source: Path | str,
) -> None:
    """Raise a sentence that names the first tensor that does not fit the model."""
    source = source / WEIGHTS_NAME if isinstance(source, Path) else source
    advice = "it was saved from another model or with other target_modules: load it into the model it belongs to"
    for name in sorted(expected.keys() - tensors.keys()):
        raise IA3Error(f"{source} lacks the tensor {name!r}, which the model has a place for; {advice}.")
    places = {**optional, **expected}
    for name in sorted(tensors.keys() - places.keys()):
        raise IA3Error(f"{source} has the tensor {name!r:.200}, which the model has no place for; {advice}.")
    for name, tensor in tensors.items():
        place = places[name]
        if tensor.shape != place.shape:
            raise IA3Error(
                f"{source} has the tensor {name!r:.200} with shape {list(tensor.shape)!s:.200}, but the model has "
                f"shape {list(place.shape)} there; {advice}."
            )
        if tensor.is_floating_point() != place.is_floating_point():
            raise IA3Error(
                f"{source} has the tensor {name!r:.200} with dtype {tensor.dtype}, but the model has {place.dtype} "
                "there; save the adapter again."
            )


def check_file(
    model: nn.Module, folder: Path, expected: dict[str, Tensor], key_mapping: dict[str, str] | None
) -> dict[str, str]:
    """Raise :class:`IA3Error` for an adapter's file that does not fit; returns the mapping by which PEFT reads it."""
    tensors, optional = read_tensors(folder, key_mapping), embedding_tensors(model)
    places = len(expected) + len(optional)
    if len(tensors) > 2 * places:  # to compare the names would take long
        raise IA3Error(
            f"{folder / WEIGHTS_NAME} has {len(tensors):,} tensors, and the model has places for {places:,} at most; "
            "it was saved from another model or with other target_modules: load it into the model it belongs to."
        )
    renamed = fitting_names(model, tensors, [*expected, *optional])
    check_tensors({renamed.get(name, name): tensor for name, tensor in tensors.items()}, expected, optional, folder)
    exact = {
        f"^{name.removeprefix(KEY_PREFIX)}$".replace(".", r"\."): place.removeprefix(KEY_PREFIX)
        for name, place in renamed.items()
    }
    return {**(key_mapping or {}), **exact}


def plain_name(name: str) -> str:
    """Return a tensor's name without what torch.compile and FSDP put into it."""
    return name.replace(COMPILED, "").replace("_fsdp_wrapped_module.", "")


def check_saved(path: Path, expected: set[str]) -> None:
    """Raise :class:`IA3Error` where a saved adapter lacks tensors; names in it become those of a plain model."""
    tensors = load_file(path)
    missing = sorted(expected - {plain_name(name) for name in tensors})
    if missing:
        raise IA3Error(
            f"the state_dict lacks {missing[0]!r} and {len(missing) - 1} others of the adapter's {len(expected)} "
            "tensors; pass that of the whole model: nothing was saved."
        )
    if any(name != plain_name(name) for name in tensors):
        save_file({plain_name(name): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})


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
    if not any(_OLD_EXPERT.search(key) for key in tensors) or not hasattr(getattr(model, "config", None), "model_type"):
        return rest, names, parameters
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    order = {pattern: list(rule.source_patterns) for rule in converters for pattern in rule.source_patterns}
    places = dict(model.named_parameters())
    for key in tensors:
        match = _OLD_EXPERT.search(key)
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
