"""A checkpoint's files: what their headers say, and a copy of them in which some tensors are changed.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its dtype,
shape and byte range), and the tensors' bytes without gaps. The safetensors library checks the headers. The bytes are
read and written here, block by block: the library writes a file from tensors that are all in memory, and what it reads
stays mapped until the file is closed, so that a merge would take a shard of memory, or four, and not some megabytes.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ia3_kernels import scale_weight_

from ..checkpoint import check_header
from ..errors import IA3Error, reason_of
from ..files import files_in, open_file, read_json, read_model_config

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The types that vectors can scale, as safetensors names them.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Files that hold weights too, which a merge does not reach: a copy of them would be the weights unmerged. The adapter's
# own two files are here because transformers applies an adapter that lies in a model's folder.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_WEIGHT_NAMES = ("adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
# Small enough to stay in a processor's cache between being read, scaled and written; 1 MiB takes twice as long.
BLOCK_BYTES = 512 << 10
# Shards in work at a time. Each is one thread's, which alone keeps neither a disk nor the page cache busy.
_THREADS = min(4, os.cpu_count() or 1)
# Left free on the disk, for folders and file systems' own needs.
_SPARE_BYTES = 16 << 20

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Entry:
    """A stored tensor: its file, and where its bytes begin there."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its weights, files that are none (tokenizers, the index), and weights that it is not made of.

    states: by which a file is the one whose header was read.
    """

    folder: Path
    config: dict[str, Any]
    shards: list[Path]
    entries: list[Entry]
    others: list[Path]
    left_out: list[Path]
    states: dict[Path, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        """Return what a copy takes on a disk."""
        return sum(self.states[path][0] for path in (*self.shards, *self.others))


@dataclass(frozen=True)
class Change:
    """What becomes of a matrix ``[rows, columns]``, a stored tensor or a part of it, whose bytes begin at ``start``.

    dim: 0, row ``i`` is multiplied by ``values[i]``; 1, column ``i`` is; -1, ``values`` [rows, columns] replaces it.
    """

    entry: Entry
    start: int
    rows: int
    columns: int
    dim: int
    values: Tensor

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * FLOATS[self.entry.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.rows * self.row_bytes

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Bytes and values of blocks of whole rows, which have at most ``BLOCK_BYTES`` each or are one row."""
        step = max(BLOCK_BYTES // self.row_bytes, 1)
        for first in range(0, self.rows, step):
            values = self.values if self.dim == 1 else self.values[first : first + step]
            yield min(step, self.rows - first) * self.row_bytes, values

    def apply(self, block: memoryview, values: Tensor) -> None:
        """Scale or replace a block in place; one rounding."""
        matrix = torch.frombuffer(block, dtype=FLOATS[self.entry.dtype]).view(-1, self.columns)
        matrix.copy_(values) if self.dim < 0 else scale_weight_(matrix, values, self.dim)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read configuration, index and headers of a model folder.

    Raises :class:`IA3Error` for a folder that is none, for weights in another format, and for shards that are missing,
    damaged, cut short or outside of the folder.
    """
    if not os.path.lexists(folder / "config.json"):
        what = "has no config.json" if folder.is_dir() else "is a file" if os.path.exists(folder) else "does not exist"
        raise IA3Error(f"{folder} {what}; name the folder of a model in transformers' format.")
    config = read_model_config(folder / "config.json")
    shards = _shards(folder)
    others: list[Path] = []
    left_out: list[Path] = []
    states = {path: _state(path.stat()) for path in files_in(folder)}
    for path in sorted(states.keys() - {*shards}):
        is_index = path == folder / INDEX_NAME and folder / SINGLE_NAME not in shards
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name in _WEIGHT_NAMES
        (left_out if is_weights and not is_index else others).append(path)
    if not shards:
        found = f"its weights are in {left_out[0].name}" if left_out else "it has no weights"
        raise IA3Error(
            f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME} ({found}); save the model with save_pretrained first."
        )
    entries = [entry for path in shards for entry in _entries(path)]
    return Checkpoint(folder, config, shards, entries, others, left_out, states)


def _state(file: os.stat_result) -> tuple[int, ...]:
    return file.st_size, file.st_ino, file.st_mtime_ns


def _shards(folder: Path) -> list[Path]:
    if (folder / SINGLE_NAME).is_file():  # transformers takes it before an index, too
        return [folder / SINGLE_NAME]
    path = folder / INDEX_NAME
    if not os.path.lexists(path):
        return []
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise IA3Error(f"{path} has no weight_map from tensors to files; get the file again.")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise IA3Error(
                f"{path} names the file {name!r:.200}; expected a .safetensors file beside it: get it again."
            )
        if not os.path.isfile(folder / name):
            raise IA3Error(f"{folder} lacks {name:.200}, which {INDEX_NAME} names; get the whole model.")
    return [folder / name for name in names]


def _entries(path: Path) -> Iterator[Entry]:
    try:
        with open_file(path) as file:
            start = file.read(8)
            check_header(path, start, os.fstat(file.fileno()).st_size)
            with safe_open(path, "pt"):  # checks all that is in the header
                length = int.from_bytes(start, "little")
                header = json.loads(file.read(length))
    except IA3Error:
        raise
    except (OSError, ValueError, MemoryError, SafetensorError) as error:
        raise IA3Error(f"{path} is damaged or cut short ({reason_of(error)}); get it again.") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield Entry(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])


def check_out(checkpoint: Checkpoint, out: Path) -> None:
    """Raise :class:`IA3Error` where a copy of the checkpoint cannot go to ``out``."""
    if os.path.lexists(out):
        raise IA3Error(f"{out} exists; name a folder that does not.")
    if out.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise IA3Error(f"{out} lies inside the base {checkpoint.folder}; name a folder outside of it.")
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    needed, free = checkpoint.nbytes + _SPARE_BYTES, shutil.disk_usage(parent).free
    if needed > free:
        raise IA3Error(f"{out} needs {needed:,} bytes, but {parent} has {free:,} free; make room there.")


def write_copy(checkpoint: Checkpoint, changes: Sequence[Change], content: Path, link: bool, advance: Advance) -> None:
    """Copy the checkpoint's files into the folder ``content``, their tensors changed; each file keeps its layout.

    Like a copy it is not forced to the disk: the base is still there. link: shards without changes become hard links
    where the file system can. advance: told of bytes as they are written, from several threads.
    """
    ended = threading.Event()

    def advance_or_end(count: int) -> None:
        if ended.is_set():
            raise InterruptedError("another file's work failed, and this one's is pointless")
        advance(count)

    def work(source: Path) -> None:
        target = content / source.relative_to(checkpoint.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        own = [change for change in changes if change.entry.file == source]
        if link and not own and source in checkpoint.shards:
            with suppress(OSError):  # another file system, or one without links: it is copied
                return os.link(source.resolve(), target)
        _copy_changed(source, checkpoint.states[source], target, own, advance_or_end)

    # Torch computes in this many threads itself: small blocks make threads wait for each other more than they help.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for copied in as_completed([pool.submit(work, path) for path in (*checkpoint.shards, *checkpoint.others)]):
                copied.result()
        finally:  # after an error or an interrupt none goes on
            ended.set()
            torch.set_num_threads(threads)


def _copy_changed(
    source: Path, state: tuple[int, ...], target: Path, changes: Sequence[Change], advance: Advance
) -> None:
    """Copy one file from its first byte to its last, with these changes."""
    buffer = memoryview(bytearray(max([BLOCK_BYTES, *(change.row_bytes for change in changes)])))
    with open_file(source) as read, open(target, "xb") as written:

        def check(is_same: bool) -> None:
            if not is_same:  # cut, replaced or written to: by whoever trains on, or by another merge
                raise IA3Error(f"{source} changed while it was read; leave it alone meanwhile.")

        def copy(size: int, change: Change | None = None, values: Tensor | None = None) -> None:
            check(read.readinto(buffer[:size]) == size)  # type: ignore[attr-defined]
            if change is not None and values is not None:
                change.apply(buffer[:size], values)
            written.write(buffer[:size])
            advance(size)

        def copy_until(stop: int) -> None:
            while (left := stop - read.tell()) > 0:
                copy(min(left, BLOCK_BYTES))

        check(_state(os.fstat(read.fileno())) == state)
        for change in sorted(changes, key=lambda change: change.start):
            copy_until(change.start)
            for size, values in change.blocks():
                copy(size, change, values)
        copy_until(state[0])
        check(_state(os.fstat(read.fileno())) == state)
