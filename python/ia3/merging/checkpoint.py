"""Merge an adapter into a checkpoint on disk, without loading the model.

What is stored under which name and what is tied to what, the model's class in transformers says: it is built without
values, and its own rules for loading rename the stored tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from ..checkpoint import KEY_PREFIX, read_tensors, stacked
from ..config import IA3Config
from ..errors import IA3Error, reason_of
from ..experts import ExpertsMatrix
from ..files import atomic_folder, read_json
from ..matching import is_feedforward
from .shards import FLOATS, Advance, Change, Checkpoint, Entry, check_out, read_checkpoint, write_copy

_VECTOR_SUFFIX = ".ia3_l"
# In a merged checkpoint's config.json: the names of the adapters that it holds, by the digests of their tensors.
_MERGED_KEY = "ia3_merged_adapters"


@dataclass(frozen=True)
class MergePlan:
    """What a merge changes in a checkpoint. digest: the adapter's."""

    checkpoint: Checkpoint
    adapter: Path
    digest: str
    changes: list[Change]


def merged_adapters(folder: Path) -> dict[str, str]:
    """Return the names of the adapters that a checkpoint's folder says it holds, by the digests of their tensors."""
    found = read_json(folder / "config.json").get(_MERGED_KEY) if os.path.lexists(folder / "config.json") else None
    return {str(digest): str(name) for digest, name in found.items()} if isinstance(found, dict) else {}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest by which a merged checkpoint knows an adapter, in hexadecimal."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return state.hexdigest()


def plan_merge(base: Path, adapter: Path, out: Path) -> MergePlan:
    """Find what the adapter in a folder changes in the checkpoint ``base``; nothing is written.

    Raises :class:`IA3Error` for the first vector that finds no tensor or does not fit its tensor, and where the
    merged checkpoint cannot go to ``out``.
    """
    checkpoint = read_checkpoint(base)
    if not os.path.isdir(adapter):
        raise IA3Error(f"the adapter {adapter} is no folder; name the one that save_pretrained wrote.")
    config, whole, names = IA3Config.from_pretrained(adapter), read_tensors(adapter), _Names(checkpoint)
    tensors = whole if names.model is None else stacked(names.model, whole)[0]
    if not any(key.endswith(_VECTOR_SUFFIX) for key in tensors):
        raise IA3Error(f"{adapter} holds no IA3 vectors; name the folder of a trained adapter.")
    changes: dict[tuple[Path, int], Change] = {}
    for key, tensor in sorted(tensors.items()):
        if not key.startswith(KEY_PREFIX) or not tensor.is_floating_point():
            raise IA3Error(f"{adapter} has {key!r:.200} as {tensor.dtype}, which is no tensor of IA3's; save it again.")
        name = key.removeprefix(KEY_PREFIX)
        for change in (_scaled if name.endswith(_VECTOR_SUFFIX) else _replaced)(names, config, name, tensor):
            # One place may have two names, an embedding's and that of a head that is tied to it: with the same values.
            changes |= {(change.entry.file, change.start): change} if change.nbytes else {}
    check_out(checkpoint, out)
    plan = MergePlan(checkpoint, adapter, digest(whole), list(changes.values()))
    if plan.digest in merged_adapters(base):
        warnings.warn(f"{adapter} was merged into {base} before; its vectors act twice.", stacklevel=2)
    return plan


def write_merged(plan: MergePlan, out: Path, *, link: bool = False, advance: Advance = lambda count: None) -> None:
    """Write the merged checkpoint to ``out``, which appears when it is whole; its config.json names the adapter.

    link: shards that no vector changes become hard links to the base's, where the file system can. advance: told of
    bytes as they are written, from several threads. Raises :class:`IA3Error`, and leaves nothing then.
    """
    with atomic_folder(out, is_new=True) as content:
        write_copy(plan.checkpoint, plan.changes, content, link, advance)
        merged = {**merged_adapters(plan.checkpoint.folder), plan.digest: plan.adapter.resolve().name}
        config = {**plan.checkpoint.config, _MERGED_KEY: merged}
        (content / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


class _Names:
    """Where a model's tensors are stored; by their stored names where transformers does not have the model's class."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model = _model_without_values(checkpoint)
        self._parameters: dict[str, Any] = {}
        self._tied: dict[str, list[str]] = {}
        if self.model is not None:
            self._parameters = self.model.state_dict()
            rules = get_model_conversion_mapping(self.model)
            self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
            self._converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
            # Tensors of separate experts, by the parameter that loading makes of them and by their pattern.
            self.separate: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
            self.orders = {
                pattern: list(rule.source_patterns)
                for rule in self._converters
                if {type(step).__name__ for step in rule.operations} <= {"MergeModulelist", "Concatenate"}
                for pattern in rule.source_patterns
            }
            same: dict[int, list[str]] = defaultdict(list)
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                same[id(parameter)].append(name)
                self._tied[name] = same[id(parameter)]
        self._homes: dict[str, list[Entry]] = defaultdict(list)
        for entry in checkpoint.entries:
            name, pattern = self._loaded(entry.name)
            if self.model is None or (name in self._parameters and pattern is None):
                self._homes[name].append(entry)
            elif pattern is not None and name in self._parameters and pattern in self.orders:
                self.separate[name][pattern].append(entry)

    def _loaded(self, stored: str) -> tuple[str, str | None]:
        """Return the model's name for a stored tensor, and the pattern by which loading changes more than its name."""
        if self.model is None:
            return stored, None
        last = self.model.base_model_prefix, self._parameters
        name, pattern = rename_source_key(stored, self._renamings, self._converters, *last)
        if name not in self._parameters:  # then loading goes without the rules, but for the prefix
            name, pattern = rename_source_key(stored, [], [], *last)
        return name, pattern

    def own(self, name: str) -> str:
        """Return the model's name for an adapter's: its own, an older release's, or with the base model's prefix."""
        return name if name in self._parameters else self._loaded(name)[0]

    def stored(self, name: str) -> list[Entry]:
        """Return what is stored for this name of the model's, or for another of the same parameter."""
        aliases = self._tied.get(name, ())
        return self._homes.get(name) or [entry for alias in aliases for entry in self._homes.get(alias, ())]

    def entry(self, name: str, what: str) -> Entry:
        """Return the place of a tensor that can be scaled; raises :class:`IA3Error` about ``what``."""
        found, folder = self.stored(name), self.checkpoint.folder
        if not found:
            raise IA3Error(
                f"{what} finds no {name!r:.200} in {folder}, where it may be fused, quantized or named otherwise; name "
                "the base that the adapter was trained on, or merge in a loaded model (merge_and_unload)."
            )
        if len(found) > 1:
            raise IA3Error(f"{folder} holds {name!r:.200} twice, and nobody can tell which one counts; get it again.")
        return _checked(found[0])

    def refuse_tied(self, name: str, what: str) -> None:
        """Raise :class:`IA3Error` where others use the same weight, which a checkpoint holds once."""
        others = ", ".join(repr(other) for other in self._tied.get(name, ()) if other != name)
        # Without the class nobody can tell; but only what lies outside of the numbered blocks is ever tied.
        is_outside = not any(part.isdigit() for part in name.split("."))
        if self.model is None and is_outside and self.checkpoint.config.get("tie_word_embeddings") is not False:
            others = "another (transformers does not have the model's class, and its config.json does not say)"
        if others:
            raise IA3Error(
                f"{what} changes {name!r:.200}, which is tied to {others}, and a checkpoint cannot hold both; merge in "
                "a loaded model (merge_and_unload), which unties them."
            )


def _checked(entry: Entry) -> Entry:
    """Return a stored tensor; raises :class:`IA3Error` for one that cannot be scaled."""
    if entry.dtype not in FLOATS:
        raise IA3Error(
            f"{entry.name!r:.200} in {entry.file} is stored as {entry.dtype}, which cannot be scaled; merge into the "
            "checkpoint in bf16, fp16 or fp32 that it was quantized from."
        )
    return entry


def _model_without_values(checkpoint: Checkpoint) -> Any:
    """Return the model that config.json describes, on the meta device; ``None`` where transformers lacks its class."""
    names = checkpoint.config.get("architectures")
    kind: Any = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model:
        return None
    try:
        with torch.device("meta"):
            return kind(kind.config_class.from_pretrained(checkpoint.folder, local_files_only=True))
    except Exception as error:  # whatever a wrong configuration leads to, in any of some hundred classes
        path, reason = checkpoint.folder / "config.json", reason_of(error)
        raise IA3Error(f"{path} describes no {kind.__name__} ({reason}); correct it, or get it again.") from None


def _scaled(names: _Names, config: IA3Config, key: str, vector: Tensor) -> list[Change]:
    """Return what a vector changes: its layer's weight and, where it scales outputs, bias."""
    path = key.removesuffix(_VECTOR_SUFFIX)
    if names.model is not None and (own := names.own(path)) in dict(names.model.named_parameters()):
        return _scaled_experts(names, own, f"the vectors of {path!r:.200}", vector)
    what, name, bias = f"the vector of {path!r:.200}", names.own(f"{path}.weight"), names.own(f"{path}.bias")
    entry = names.entry(name, what)
    names.refuse_tied(name, what)
    is_input = is_feedforward(path, config.feedforward_modules)
    scale = vector.detach().float().reshape(-1)  # as in a loaded model, whose vectors are fp32
    shape, length = entry.shape, scale.numel()
    side = f"and feedforward_modules says that its {'inputs' if is_input else 'outputs'} are scaled"
    if vector.dim() != len(shape) or len(shape) < 2 or (len(shape) == 2 and vector.shape[not is_input] != 1):
        raise _misfit(what, vector, entry, side)
    layer = None if names.model is None else names.model.get_submodule(name.removesuffix(".weight"))
    is_transposed = config.fan_in_fan_out if layer is None else isinstance(layer, Conv1D)
    dim = int(is_input != (is_transposed and len(shape) == 2))
    # A grouped convolution: each group of output channels has input channels, and so a part of the vector, of its own.
    groups = length // max(shape[1], 1) if dim and len(shape) > 2 else 1
    if groups < 1 or length != (shape[1] * groups if dim else shape[0]) or shape[0] % groups:
        raise _misfit(what, vector, entry, side)
    kernel = math.prod(shape[2:])  # positions of a convolution's kernel; 1 for a matrix
    rows, columns = shape[0] // groups, shape[1] * kernel
    parts = scale.repeat_interleave(kernel).view(groups, columns) if dim else [scale]
    size = rows * columns * FLOATS[entry.dtype].itemsize
    changes = [Change(entry, entry.start + i * size, rows, columns, dim, part) for i, part in enumerate(parts)]
    if not is_input and names.stored(bias):
        entry = names.entry(bias, what)
        if entry.shape != (length,):
            raise _misfit(what, vector, entry, side)
        changes.append(Change(entry, entry.start, 1, length, 1, scale))
    return changes


def _scaled_experts(names: _Names, name: str, what: str, vectors: Tensor) -> list[Change]:
    """Return what the vectors of a parameter of experts change, which is stored as it is, or as a matrix for each."""
    outer, _, leaf = name.rpartition(".")
    matrix = ExpertsMatrix(names.model.get_submodule(outer), leaf)
    weight: Any = matrix._parameters["weight"]
    scales = vectors.detach().float().reshape(matrix.vector_shape[0], -1)
    separate, changes = names.separate.get(name), []
    if separate is None:
        entry = names.entry(name, what)
        if tuple(vectors.shape) != matrix.vector_shape or entry.shape != tuple(weight.shape):
            raise _misfit(what, vectors, entry, "a matrix for each expert")
        _, rows, columns = entry.shape
        size = rows * columns * FLOATS[entry.dtype].itemsize
        for expert, scale in enumerate(scales):
            changes.append(Change(entry, entry.start + expert * size, rows, columns, matrix.dim, scale))
        if not matrix.is_input and names.stored(f"{name}_bias"):
            bias = names.entry(f"{name}_bias", what)
            changes.append(Change(bias, bias.start, 1, scales.numel(), 1, scales.reshape(-1)))
        return changes
    patterns = names.orders[next(iter(separate))]  # gate and up, which are joined
    for part, pattern in enumerate(patterns):
        for entry in separate[pattern]:
            found = re.search(r"\.experts\.(\d{1,9})\.", entry.name)
            if found is None or int(found[1]) >= len(scales):
                raise IA3Error(f"{entry.name!r:.200} in {entry.file} belongs to no expert of the model; get it again.")
            scale = scales[int(found[1])].chunk(len(patterns))[part]
            is_fitting = tuple(vectors.shape) == matrix.vector_shape and len(entry.shape) == 2
            if not is_fitting or scale.shape[0] != entry.shape[matrix.dim]:
                raise _misfit(what, vectors, entry, "one of the matrices that they scale")
            rows, columns = entry.shape
            changes.append(Change(_checked(entry), entry.start, rows, columns, matrix.dim, scale))
    if len(changes) != len(scales) * len(patterns):
        raise IA3Error(
            f"{names.checkpoint.folder} has {len(changes)} matrices for {name!r:.200}, which is made of "
            f"{len(scales) * len(patterns)}; get the whole model."
        )
    return changes


def _replaced(names: _Names, config: IA3Config, key: str, tensor: Tensor) -> list[Change]:
    """Return what a tensor of ``modules_to_save`` takes the place of, in the base's dtype."""
    what, name = f"what the adapter holds whole, {key!r:.200},", names.own(key)
    entry = names.entry(name, what)
    # What save_pretrained adds of embeddings is as the model has them, ties included; what was trained breaks them.
    if any(f".{part}." in f".{key}" for part in config.modules_to_save or ()):
        names.refuse_tied(name, what)
    if tuple(tensor.shape) != entry.shape:
        raise _misfit(what, tensor, entry, "which it has to have")
    rows = tensor.shape[0] if tensor.dim() > 1 else 1
    columns = tensor.numel() // max(rows, 1)
    return [Change(entry, entry.start, rows, columns, -1, tensor.detach().reshape(rows, columns))]


def _misfit(what: str, tensor: Tensor, entry: Entry, why: str) -> IA3Error:
    return IA3Error(
        f"{what} has shape {list(tensor.shape)!s:.200}, but {entry.name!r:.200} in {entry.file} has shape "
        f"{list(entry.shape)!s:.200}, {why}; name the base that the adapter was trained on."
    )
