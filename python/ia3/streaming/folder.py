"""A merged copy of a checkpoint, written beside it tensor by tensor; and the check of such a copy."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import IA3Error
from ..files import atomic_folder
from .blocks import WRITE_BYTES, Block, new_buffer, octets, one_thread, read_into, same_values
from .layout import Checkpoint, Shard, read_checkpoint
from .plan import MergePlan, plan_merge
from .state import refuse_interrupted, refuse_merged

# Small enough to stay in a processor's cache between being read, scaled and written.
BLOCK_BYTES = WRITE_BYTES
# What one call copies inside of the kernel, and what a buffer holds where that is not possible.
_COPY_BYTES = 64 << 20
# Shards in work at a time. Each is one thread's, which alone keeps neither a disk nor the page cache busy.
_THREADS = min(4, os.cpu_count() or 1)
# Left free on the disk, for folders and file systems' own needs.
SPARE_BYTES = 16 << 20

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Summary:
    """What a merge or its check went through: tensors changed and their bytes, other bytes, other files."""

    tensors: int
    scaled_bytes: int
    other_bytes: int
    files: int
    left_out: tuple[Path, ...] = ()


def total_bytes(checkpoint: Checkpoint) -> int:
    """What a copy of the checkpoint takes on a disk."""
    return sum(shard.size for shard in checkpoint.shards) + sum(
        (checkpoint.folder / path).stat().st_size for path in checkpoint.other_files()
    )


def prepare(base: Path, adapter: Path, out: Path | None = None) -> tuple[Checkpoint, MergePlan]:
    """Read what is there and plan what will be; raises :class:`IA3Error` for whatever is wrong with either."""
    checkpoint = read_checkpoint(base)
    refuse_interrupted(base)
    refuse_merged(base)
    plan = plan_merge(checkpoint, adapter).in_pieces(BLOCK_BYTES)
    if out is not None:
        if os.path.lexists(out):
            raise IA3Error(f"{out} exists; name a folder that does not.")
        if out.resolve().is_relative_to(base.resolve()):
            raise IA3Error(f"{out} lies inside the base {base}; name a folder outside of it.")
        parent = next(folder for folder in out.resolve().parents if folder.exists())
        needed, free = total_bytes(checkpoint) + SPARE_BYTES, shutil.disk_usage(parent).free
        if needed > free:
            raise IA3Error(f"{out} needs {needed:,} bytes, but {parent} has {free:,} free; make room there.")
    return checkpoint, plan


def merge_folder(checkpoint: Checkpoint, plan: MergePlan, out: Path, advance: Advance = lambda count: None) -> Summary:
    """Write the merged checkpoint to ``out``, which appears when it is whole; the files keep their layout.

    Like a copy it is not forced to the disk: the base is still there. advance: told of bytes as they are written, from
    several threads.
    Raises :class:`IA3Error`, and leaves nothing then.
    """
    with one_thread(), atomic_folder(out) as content:
        _for_each(checkpoint.shards, partial(_write_shard, plan, content), advance)
        others = list(checkpoint.other_files())
        for path in others:
            source = checkpoint.folder / path
            (content / path).parent.mkdir(parents=True, exist_ok=True)
            with open_to_read(source) as read, open(content / path, "wb") as written:
                _copy_range(read, written.fileno(), 0, source.stat().st_size, source, advance)
    return summarize(checkpoint, plan, len(others))


def _for_each(shards: Sequence[Shard], work: Callable[[Shard, Advance], None], advance: Advance) -> None:
    """Call ``work(shard, advance)`` for all of them, some at a time; after an error or an interrupt none goes on."""
    has_ended = threading.Event()

    def advance_or_end(count: int) -> None:
        if has_ended.is_set():
            raise InterruptedError("another file's work failed, and this one's is pointless")
        advance(count)

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for done in as_completed([pool.submit(work, shard, advance_or_end) for shard in shards]):
                done.result()
        except BaseException:
            has_ended.set()
            pool.shutdown(cancel_futures=True)
            raise


def summarize(checkpoint: Checkpoint, plan: MergePlan, files: int) -> Summary:
    """What a merge of this plan goes through, with ``files`` files that are no weights."""
    scaled = sum(block.nbytes for block in plan.blocks)
    return Summary(
        tensors=len({(block.file, block.tensor) for block in plan.blocks}),
        scaled_bytes=scaled,
        other_bytes=sum(shard.size for shard in checkpoint.shards) - scaled,
        files=files,
        left_out=tuple(checkpoint.unread_weights()),
    )


def _write_shard(plan: MergePlan, out: Path, shard: Shard, advance: Advance) -> None:
    path = out / shard.path.name
    blocks = plan.of_file(shard.path.name)
    buffer = new_buffer(blocks)
    with open_to_read(shard.path) as read, open(path, "wb") as written:
        for block, start, stop in segments(shard, blocks):
            if block is None:
                _copy_range(read, written.fileno(), start, stop, shard.path, advance)
                continue
            piece = buffer[: block.nbytes]
            read_into(read, piece, start, str(shard.path))
            block.apply(piece, plan.vectors)
            os.lseek(written.fileno(), start, os.SEEK_SET)
            _write_all(written.fileno(), octets(piece))
            advance(block.nbytes)


def segments(shard: Shard, blocks: list[Block]) -> Iterator[tuple[Block | None, int, int]]:
    """A file from its first byte to its last, in ranges ``(block, start, stop)``; the block is None between blocks."""
    position = 0
    for block in blocks:
        if block.start > position:
            yield None, position, block.start
        position = block.start + block.nbytes
        yield block, block.start, position
    if position < shard.size:
        yield None, position, shard.size


@contextmanager
def open_to_read(path: Path) -> Iterator[int]:
    """A file descriptor of a file; raises :class:`IA3Error`."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise IA3Error(f"{path} cannot be read: {error.strerror or error}; check the file.") from None
    try:
        yield file
    finally:
        os.close(file)


def _copy_range(read: int, written: int, start: int, stop: int, source: Path, advance: Advance) -> None:
    """Copy bytes to the same place in another file, without reading them into this process where that is possible."""
    while start < stop:
        count = _copy_in_kernel(read, written, start, min(_COPY_BYTES, stop - start))
        if not count:
            data = os.pread(read, min(BLOCK_BYTES, stop - start), start)
            if not data:
                raise IA3Error(f"{source} ends after {start} bytes, and was longer before; leave it alone meanwhile.")
            os.lseek(written, start, os.SEEK_SET)
            _write_all(written, memoryview(data))
            count = len(data)
        start += count
        advance(count)


def _copy_in_kernel(read: int, written: int, start: int, count: int) -> int:
    """Bytes that the system copied by itself; 0 where it cannot, between two file systems say."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(read, written, count, start, start)
    except OSError:  # what is really wrong (a full disk), reading and writing will say
        return 0


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


# --- the check ---------------------------------------------------------------------------------------------------


def verify_folder(checkpoint: Checkpoint, plan: MergePlan, out: Path, advance: Advance = lambda count: None) -> Summary:
    """Read base and copy again, and compare: changed tensors with the product recomputed by torch, the rest by byte.

    Raises :class:`IA3Error` that names the first tensor or file that differs.
    """
    others = list(checkpoint.other_files())
    with one_thread():
        _for_each(checkpoint.shards, partial(_verify_shard, plan, out), advance)
    for path in others:
        if (checkpoint.folder / path).read_bytes() != (out / path).read_bytes():
            raise _difference(out / path, str(path))
    return summarize(checkpoint, plan, len(others))


def _verify_shard(plan: MergePlan, out: Path, shard: Shard, advance: Advance) -> None:
    path = out / shard.path.name
    blocks = plan.of_file(shard.path.name)
    expected, found = (new_buffer(blocks, BLOCK_BYTES) for _ in range(2))
    with open_to_read(shard.path) as base, open_to_read(path) as copy:
        if os.fstat(copy).st_size != shard.size:
            raise _difference(path, "the size")
        for block, start, stop in segments(shard, blocks):
            for first in range(start, stop, len(expected)):
                count = min(len(expected), stop - first)
                read_into(base, expected[:count], first, str(shard.path))
                read_into(copy, found[:count], first, str(path))
                if block is None:
                    is_same = bool((expected[:count] == found[:count]).all())
                else:
                    block.apply_by_reference(expected[:count], plan.vectors)
                    is_same = same_values(block.matrix(expected), block.matrix(found))
                if not is_same:
                    raise _difference(path, block.tensor if block else f"what stands at byte {first}")
                advance(count)


def _difference(path: Path, what: str) -> IA3Error:
    return IA3Error(f"{path} is not what it should be: {what} differs; check the disk, and merge again.")
