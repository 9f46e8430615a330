"""Which bytes of a checkpoint an adapter changes, found from names and shapes before anything is written."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import KEY_PREFIX, read_tensors
from ..config import IA3Config
from ..errors import IA3Error
from ..matching import is_feedforward
from .blocks import Block, octets
from .layout import FLOATS, Checkpoint, TensorEntry

VECTOR_SUFFIX = ".ia3_l"
# What stands beside a quantized weight, whatever its own type says.
_QUANTIZATION_PARTS = ("qweight", "scales", "weight_scale", "weight_scale_inv", "SCB", "weight.absmax", "weight_packed")


@dataclass(frozen=True)
class MergePlan:
    """The blocks that a merge changes, in the order of their bytes in each file.

    vectors: what the blocks name: scales in at least fp32, and the tensors that replace others (``modules_to_save``).
    adapter: the adapter's folder, and what its configuration says.
    """

    blocks: tuple[Block, ...]
    vectors: dict[str, Tensor]
    adapter: Path
    config: IA3Config

    def digest(self) -> str:
        """Tells two merges apart: which bytes they change, and by what."""
        state = hashlib.sha256(json.dumps([asdict(block) for block in self.blocks]).encode())
        for name in sorted(self.vectors):
            state.update(octets(self.vectors[name].contiguous()))
        return state.hexdigest()

    def of_file(self, name: str) -> list[Block]:
        """The blocks of one file."""
        return [block for block in self.blocks if block.file == name]

    def in_pieces(self, limit: int) -> MergePlan:
        """The same plan with no block larger than ``limit`` bytes, or one row."""
        pieces = tuple(piece for block in self.blocks for piece in block.pieces(limit))
        return MergePlan(pieces, self.vectors, self.adapter, self.config)


def plan_merge(checkpoint: Checkpoint, adapter: Path) -> MergePlan:
    """Find what the adapter in a folder changes in a checkpoint.

    Raises :class:`IA3Error` for the first vector that finds no tensor or does not fit its tensor.
    """
    if not adapter.is_dir():
        what = "is a file" if adapter.exists() else "does not exist"
        raise IA3Error(f"the adapter {adapter} {what}; name the folder that save_pretrained wrote.")
    config = IA3Config.from_pretrained(adapter)
    tensors = read_tensors(adapter)
    for name in sorted(tensors):
        if not name.startswith(KEY_PREFIX):
            raise IA3Error(f"{adapter} has the tensor {name!r}, which is none of an IA3 adapter; save it again.")
    vectors = {
        name.removeprefix(KEY_PREFIX).removesuffix(VECTOR_SUFFIX): tensor
        for name, tensor in sorted(tensors.items())
        if name.endswith(VECTOR_SUFFIX)
    }
    saved = {
        name.removeprefix(KEY_PREFIX): tensor for name, tensor in tensors.items() if not name.endswith(VECTOR_SUFFIX)
    }
    if not vectors:
        raise IA3Error(f"{adapter} holds no IA3 vectors; name the folder of a trained adapter.")
    for path, vector in vectors.items():
        if not vector.isfinite().all():
            raise IA3Error(f"the vector of {path!r} in {adapter} has values that are not finite; train it again.")
    rename = _renaming(checkpoint, vectors)
    # What save_pretrained adds of embeddings is as the model has them, ties included; what was trained breaks them.
    trained = (name.rpartition(".")[0] for name in saved)
    _check_ties(checkpoint, [*vectors, *(path for path in trained if _is_named(path, config.modules_to_save))])
    transposed = _stored_transposed(checkpoint, config, vectors, rename)
    blocks: list[Block] = []
    scales: dict[str, Tensor] = {}
    for path, vector in vectors.items():
        blocks += _scaled(checkpoint, config, path, rename(path), vector, transposed[path], scales)
    for name, tensor in saved.items():
        blocks.append(_replaced(checkpoint, adapter, name, rename(name), tensor))
        scales[name] = tensor.detach()
    blocks.sort(key=lambda block: (block.file, block.start))
    return MergePlan(tuple(block for block in blocks if block.nbytes), scales, adapter, config)


# --- names -------------------------------------------------------------------------------------------------------


class _Renaming:
    """From the names of a model to those of its checkpoint, which may lack the base model's prefix or have one more."""

    def __init__(self, drop: str = "", add: str = "") -> None:
        self.drop, self.add = drop, add

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.drop)


def _renaming(checkpoint: Checkpoint, paths: Mapping[str, Any]) -> _Renaming:
    """The renaming under which every path has a weight: none, or one that loading into transformers does as well.

    A checkpoint of ``GPT2Model`` names ``h.0.attn.c_attn`` what is ``transformer.h.0.attn.c_attn`` in
    ``GPT2LMHeadModel``, and the other way round.
    """
    names = checkpoint.homes
    first = sorted({path.partition(".")[0] + "." for path in paths})
    outer = sorted({name.partition(".")[0] + "." for name in names})
    choices = [_Renaming(), *(_Renaming(drop=prefix) for prefix in first), *(_Renaming(add=prefix) for prefix in outer)]

    def missing(choice: _Renaming) -> list[str]:
        return [path for path in paths if f"{choice(path)}.weight" not in names]

    fits = [choice for choice in choices if not missing(choice)]
    # Dropping or adding a prefix is a guess that only one of them may make.
    if fits and (fits[0] is choices[0] or len(fits) == 1):
        return fits[0]
    if fits:
        options = ", ".join(repr(choice(next(iter(paths)))) for choice in fits)
        raise IA3Error(f"the checkpoint has several modules for one of the adapter's: {options}; name its own base.")
    best = min(choices, key=lambda choice: len(missing(choice)))
    path = missing(best)[0]
    _refuse_quantized(checkpoint, best(path))
    if len(missing(best)) < len(paths):
        reason = (
            "it may be tied to another tensor and stored under that one's name, and scaling would change both"
            if "." not in best(path)
            else "its layers may be fused or named otherwise"
        )
    else:
        reason = "none of its vectors does"
    raise IA3Error(
        f"the adapter's vector for {path!r} finds no {best(path) + '.weight'!r} in {checkpoint.folder} ({reason}); "
        "name the base that the adapter was trained on, or merge in a loaded model (merge_and_unload)."
    )


def _refuse_quantized(checkpoint: Checkpoint, path: str) -> None:
    for part in _QUANTIZATION_PARTS:
        if f"{path}.{part}" in checkpoint.homes:
            raise IA3Error(
                f"{path!r} is quantized in {checkpoint.folder} (it has {part}), and packed weights cannot be scaled on "
                "disk; merge into the checkpoint that it was quantized from."
            )


def _entry(checkpoint: Checkpoint, name: str) -> tuple[str, TensorEntry]:
    """The file and place of a tensor that can be scaled."""
    shard = checkpoint.homes[name]
    entry = shard.tensors[name]
    if entry.dtype not in FLOATS:
        raise IA3Error(
            f"{name!r} in {shard.path} is stored as {entry.dtype}, which cannot be scaled; merge into a checkpoint in "
            "bf16, fp16 or fp32."
        )
    return shard.path.name, entry


# --- tied weights ------------------------------------------------------------------------------------------------


def _is_named(path: str, modules_to_save: list[str] | None) -> bool:
    return any(re.search(rf"(^|\.){re.escape(name)}($|\.)", path) for name in modules_to_save or ())


def _check_ties(checkpoint: Checkpoint, paths: list[str]) -> None:
    """Refuse modules whose weight another module uses under a name that the checkpoint does not have.

    Only embeddings and output layers are tied, which lie outside of the numbered blocks; so the model's class, which
    knows, is rarely asked.
    """
    outside = [path for path in paths if not any(part.isdigit() for part in path.split("."))]
    if not outside:
        return
    tied = _tied_modules(checkpoint)
    for path in outside:
        for names in tied:
            others = sorted(name for name in names if name != path and not name.endswith("." + path))
            if len(others) < len(names):
                raise IA3Error(
                    f"the adapter changes {path!r}, whose weight is tied to {', '.join(map(repr, others))}, and a "
                    "checkpoint cannot hold both; merge in a loaded model (merge_and_unload), which unties them."
                )


def _tied_modules(checkpoint: Checkpoint) -> list[set[str]]:
    """Modules that share a weight, as the model's class says it; raises where a model that ties cannot be asked."""
    names = checkpoint.config.get("architectures") or [None]
    if names == [None] and "model_type" not in checkpoint.config:
        return []  # no model of transformers, so nothing there ties
    import transformers

    try:
        loaded = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        ties = bool(getattr(loaded.get_text_config(), "tie_word_embeddings", False))
    except (OSError, ValueError, KeyError, AttributeError):
        ties = bool(checkpoint.config.get("tie_word_embeddings", True))
    if not ties:
        return []
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise IA3Error(
            f"{checkpoint.folder} is a {names[0]}, which transformers does not know, so that nobody can tell which of "
            "its weights are tied; merge in a loaded model (merge_and_unload)."
        )
    keys = getattr(kind, "_tied_weights_keys", None) or {}
    pairs = keys.items() if isinstance(keys, dict) else ()
    return [{_module(name) for name in pair} for pair in pairs]


def _module(pattern: str) -> str:
    return pattern.lstrip("^").removesuffix("$").replace("\\.", ".").removesuffix(".weight").removesuffix(".bias")


# --- sides and orientations --------------------------------------------------------------------------------------


def _scales_input(config: IA3Config, path: str, vector: Tensor) -> bool:
    """Whether the vector scales inputs: told from its shape, or else by the configuration, which has to agree."""
    named = is_feedforward(path, config.feedforward_modules)
    if vector.dim() == 2 and vector.shape[0] != vector.shape[1]:
        shaped = vector.shape[0] == 1
        if 1 not in vector.shape:
            raise IA3Error(f"the vector of {path!r} has shape {list(vector.shape)}; expected [n, 1] or [1, n].")
        if config.feedforward_modules is not None and shaped != named:
            sides = ("outputs", "inputs")
            raise IA3Error(
                f"the vector of {path!r} has shape {list(vector.shape)}, so that it scales {sides[shaped]}, but "
                f"feedforward_modules of the adapter says {sides[named]}; save the adapter again."
            )
        return shaped
    if vector.dim() not in (2, 4, 5):
        raise IA3Error(
            f"the vector of {path!r} has shape {list(vector.shape)}; expected [n, 1], [1, n] or [1, n, 1, 1(, 1)]."
        )
    if config.feedforward_modules is None:
        raise IA3Error(
            f"the shape {list(vector.shape)} of the vector of {path!r} does not tell whether it scales inputs or "
            "outputs, and the adapter has no feedforward_modules; set them in its adapter_config.json."
        )
    return named


def _stored_transposed(
    checkpoint: Checkpoint, config: IA3Config, vectors: Mapping[str, Tensor], rename: _Renaming
) -> dict[str, bool]:
    """Whether each matrix is stored ``[in, out]`` (``Conv1D``), told from lengths; squares are what the others are."""
    told: dict[str, bool | None] = {}
    for path, vector in vectors.items():
        name = f"{rename(path)}.weight"
        _refuse_quantized(checkpoint, rename(path))
        _, entry = _entry(checkpoint, name)
        if vector.dim() != 2 or len(entry.shape) != 2:
            told[path] = False
            continue
        length = vector.numel()
        usual, other = entry.shape[::-1] if _scales_input(config, path, vector) else entry.shape
        if length not in entry.shape:
            raise IA3Error(
                f"the vector of {path!r} has {length} values, but {name!r} in {checkpoint.folder} has shape "
                f"{list(entry.shape)}; name the base that the adapter was trained on."
            )
        told[path] = None if usual == other else length == other
    known = {answer for path, answer in told.items() if answer is not None and vectors[path].dim() == 2}
    squares = [path for path, answer in told.items() if answer is None]
    if squares and known - {config.fan_in_fan_out}:
        raise IA3Error(
            f"{rename(squares[0]) + '.weight'!r} is square, and fan_in_fan_out of the adapter ({config.fan_in_fan_out})"
            " contradicts the shapes of other weights, so that nobody can tell its rows from its columns; correct "
            "fan_in_fan_out in adapter_config.json, or merge in a loaded model (merge_and_unload)."
        )
    return {path: config.fan_in_fan_out if answer is None else answer for path, answer in told.items()}


# --- blocks ------------------------------------------------------------------------------------------------------


def _scaled(
    checkpoint: Checkpoint,
    config: IA3Config,
    path: str,
    renamed: str,
    vector: Tensor,
    transposed: bool,
    scales: dict[str, Tensor],
) -> list[Block]:
    """The blocks of one layer's weight and, where its output is scaled, bias. Adds the scales that they name."""
    file, entry = _entry(checkpoint, f"{renamed}.weight")
    is_input = _scales_input(config, path, vector)
    scale = vector.detach().to(torch.promote_types(vector.dtype, torch.float32)).reshape(-1)
    shape, length = entry.shape, scale.numel()

    def block(place: tuple[str, TensorEntry], rows: int, columns: int, dim: int, **part: Any) -> Block:
        where = {"file": place[0], "tensor": place[1].name, "start": place[1].start, "dtype": place[1].dtype}
        return Block(**{**where, "rows": rows, "columns": columns, "dim": dim, "vector": path, "low": 0, **part})

    def misfit(name: str, shape: tuple[int, ...]) -> IA3Error:
        return IA3Error(
            f"the vector of {path!r} has shape {list(vector.shape)}, but {name!r} in {checkpoint.folder} has shape "
            f"{list(shape)}; name the base that the adapter was trained on."
        )

    scales[path] = scale
    if len(shape) != vector.dim() or len(shape) < 2:
        raise misfit(entry.name, shape)
    kernel = math.prod(shape[2:])  # positions of a convolution's kernel; 1 for a matrix
    if not is_input:
        outputs = shape[1] if transposed else shape[0]
        if outputs != length:
            raise misfit(entry.name, shape)
        blocks = [block((file, entry), shape[0], math.prod(shape[1:]), int(transposed), high=length)]
        if f"{renamed}.bias" in checkpoint.homes:
            place = _entry(checkpoint, f"{renamed}.bias")
            if place[1].shape != (length,):
                raise misfit(place[1].name, place[1].shape)
            blocks.append(block(place, 1, length, 1, high=length))
        return blocks
    if transposed:
        return [block((file, entry), shape[0], shape[1], 0, high=length)]
    groups = length // shape[1] if shape[1] else 0
    if groups * shape[1] != length or groups < 1 or shape[0] % groups or (groups > 1 and len(shape) == 2):
        raise misfit(entry.name, shape)
    # A grouped convolution: each group of output channels has input channels, and so a part of the vector, of its own.
    scales[path] = scale.repeat_interleave(kernel)
    rows, columns = shape[0] // groups, shape[1] * kernel
    size = rows * columns * FLOATS[entry.dtype].itemsize
    return [
        block(
            (file, entry),
            rows,
            columns,
            1,
            start=entry.start + group * size,
            low=group * columns,
            high=(group + 1) * columns,
        )
        for group in range(groups)
    ]


def _replaced(checkpoint: Checkpoint, adapter: Path, name: str, renamed: str, tensor: Tensor) -> Block:
    """The block of a tensor that the adapter holds whole."""
    if renamed not in checkpoint.homes:
        raise IA3Error(
            f"{adapter} holds {name!r}, trained whole (modules_to_save), which {checkpoint.folder} has no tensor for; "
            "save the base with that head first, or merge in a loaded model (merge_and_unload)."
        )
    file, entry = _entry(checkpoint, renamed)
    if tuple(tensor.shape) != entry.shape or not tensor.is_floating_point():
        raise IA3Error(
            f"{adapter} holds {name!r} as {tensor.dtype} of shape {list(tensor.shape)}, but {checkpoint.folder} has "
            f"shape {list(entry.shape)} there; name the base that the adapter was trained on."
        )
    rows = entry.shape[0] if len(entry.shape) > 1 else 1
    columns = tensor.numel() // max(rows, 1)
    return Block(file, renamed, entry.start, rows, columns, entry.dtype, -1, name, 0, tensor.numel())
