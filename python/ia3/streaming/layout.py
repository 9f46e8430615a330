"""What a checkpoint's files hold and where: names, types, shapes and byte ranges, read from the headers alone.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its dtype,
shape and byte range, and ``__metadata__``), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import IA3Error

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The types that vectors can scale, as safetensors names them.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Files that hold weights too, which a merge does not reach: a copy of them would be the weights unmerged. The adapter's
# own two files are here because transformers applies an adapter that lies in a model's folder.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
WEIGHT_NAMES = ("adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
# What other programs keep in a folder and no model needs.
_NOT_PART_OF_A_MODEL = (".git", ".cache")
# The largest header that the format's own library reads.
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file: its byte range, from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint."""

    path: Path
    size: int
    header_checksum: int
    tensors: dict[str, TensorEntry]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder in transformers' format, its weights in one safetensors file or in several with an index."""

    folder: Path
    shards: tuple[Shard, ...]
    config: dict[str, Any]

    @cached_property
    def homes(self) -> dict[str, Shard]:
        """The shard that holds each tensor."""
        return {name: shard for shard in self.shards for name in shard.tensors}

    def other_files(self) -> Iterator[Path]:
        """The files of the folder that are no weights (configurations, tokenizers, the index), relative to it."""
        is_sharded = self.shards[0].path.name != SINGLE_NAME
        for path in self._files():
            if not is_weights(path) or (is_sharded and str(path) == INDEX_NAME):
                yield path

    def unread_weights(self) -> list[Path]:
        """The files of the folder that hold weights of which this checkpoint is not made, relative to it."""
        used = {shard.path.name for shard in self.shards}
        return [path for path in self._files() if is_weights(path) and str(path) not in {*used, INDEX_NAME}]

    def _files(self) -> Iterator[Path]:
        for parent, folders, names in os.walk(self.folder, followlinks=True):
            folders[:] = sorted(name for name in folders if name not in _NOT_PART_OF_A_MODEL)
            yield from (Path(parent, name).relative_to(self.folder) for name in sorted(names))


def is_weights(path: Path) -> bool:
    """Whether a file of this name holds weights, or points to some."""
    return path.suffix in WEIGHT_SUFFIXES or path.name in WEIGHT_NAMES


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises :class:`IA3Error`."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise IA3Error(f"{path} cannot be read as JSON ({error}); get the file again.") from None
    if not isinstance(content, dict):
        raise IA3Error(f"{path} holds a {type(content).__name__}; expected a JSON object: get the file again.")
    return content


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read configuration, index and headers of a model folder, and check that the files are whole.

    Raises :class:`IA3Error` for a folder that is none, for weights in another format or quantized, and for shards that
    are missing or cut short.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise IA3Error(f"{folder} {what}; name the folder of a model in transformers' format.")
    if not (folder / "config.json").is_file():
        raise IA3Error(f"{folder} has no config.json, so it is no model folder; name one in transformers' format.")
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else "?"
        raise IA3Error(
            f"{folder} is quantized ({method}), and packed weights cannot be scaled on disk; merge into the checkpoint "
            "that it was quantized from."
        )
    if (folder / SINGLE_NAME).exists():  # transformers takes it before an index, too
        return Checkpoint(folder, (read_shard(folder / SINGLE_NAME),), config)
    if (folder / INDEX_NAME).exists():
        return Checkpoint(folder, _indexed_shards(folder), config)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    found = f"its weights are in {others[0]}" if others else "it has no weights"
    raise IA3Error(
        f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME} ({found}); save the model with save_pretrained first."
    )


def _indexed_shards(folder: Path) -> tuple[Shard, ...]:
    path = folder / INDEX_NAME
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise IA3Error(f"{path} has no weight_map from tensors to files; get the file again.")
    shards: dict[str, Shard] = {}
    seen: dict[str, str] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise IA3Error(f"{path} names the file {name!r}; expected a .safetensors file beside it: get it again.")
        if not (folder / name).is_file():
            raise IA3Error(f"{folder} lacks {name}, which {INDEX_NAME} names; get the whole model.")
        shards[name] = read_shard(folder / name)
        for tensor in shards[name].tensors:
            if tensor in seen:
                raise IA3Error(
                    f"{folder} holds the tensor {tensor!r} twice, in {seen[tensor]} and in {name}; get the model again."
                )
            seen[tensor] = name
    for tensor, name in places.items():
        if tensor not in shards[name].tensors:
            raise IA3Error(f"{folder / name} lacks the tensor {tensor!r}, which {INDEX_NAME} puts there; get it again.")
    return tuple(shards.values())


def read_shard(path: Path) -> Shard:
    """The layout of one safetensors file; raises :class:`IA3Error` where it is damaged or cut short."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
                raise IA3Error(f"{path} is damaged: its header does not fit into its {size} bytes; get it again.")
            header = file.read(length)
    except OSError as error:
        raise IA3Error(f"{path} cannot be read: {error.strerror or error}; check the file.") from None
    first = 8 + length
    try:
        entries = json.loads(header)
        tensors = {
            name: TensorEntry(
                name,
                str(entry["dtype"]),
                tuple(map(int, entry["shape"])),
                first + int(entry["data_offsets"][0]),
                first + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise IA3Error(f"{path} is damaged: its header is no table of tensors; get it again.") from None
    end = first
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.stop > size:
            raise IA3Error(f"{path} ends after {size} bytes, inside the tensor {entry.name!r}; get it again.")
        kind = FLOATS.get(entry.dtype)
        is_whole = kind is None or entry.stop - entry.start == kind.itemsize * math.prod(entry.shape)
        if entry.start != end or entry.stop < entry.start or not is_whole:
            raise IA3Error(f"{path} is damaged: the bytes of {entry.name!r} do not fit its shape; get it again.")
        end = entry.stop
    if end != size:
        raise IA3Error(f"{path} has {size - end} bytes after its last tensor; get it again.")
    return Shard(path, size, zlib.crc32(header), tensors)
