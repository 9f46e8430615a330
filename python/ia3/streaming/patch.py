"""Merging into a checkpoint's own files, and undoing it, both safe against being killed at any moment.

Where the journal's rules are followed; see ``journal`` for what they are.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import IA3Error
from . import exact
from .blocks import Block, checksum, new_buffer, octets, one_thread, read_into, same_values
from .folder import SPARE_BYTES, Advance, Summary, open_to_read, segments, summarize
from .journal import Disk, Journal
from .layout import Checkpoint, read_checkpoint, read_shard
from .plan import MergePlan, plan_merge
from .state import BLOCK_NAME, JOURNAL_NAME, KEPT_NAME, SCRATCH_NAME, is_interrupted, refuse_merged

# A block is written twice, and forced to the disk twice: large enough that this costs bandwidth and not latency.
BLOCK_BYTES = 16 << 20

Say = Callable[[str], None]


class _Job:
    """A journal, the files that it is about, and the steps that change them."""

    def __init__(self, folder: Path, journal: Journal, disk: Disk, files: ExitStack) -> None:
        self.folder, self.journal, self._disk = folder, journal, disk
        self.blocks = [Block(**block) for block in journal.job["blocks"]]
        for shard in journal.job["shards"]:
            found = read_shard(folder / shard["name"])
            if (found.size, found.header_checksum) != (shard["size"], shard["header_checksum"]):
                raise IA3Error(
                    f"{found.path} is another file than the one that was merged into; put that one back, or remove "
                    f"{journal.path} to give up undoing the merge."
                )
        self._files = {shard["name"]: _open_to_write(folder / shard["name"], files) for shard in journal.job["shards"]}
        self._opened, self._slot_path = files, folder / BLOCK_NAME
        self._slot = _open_to_write(self._slot_path, files) if self._slot_path.exists() else None
        self._buffer = new_buffer(self.blocks)

    def read(self, index: int) -> Tensor:
        """The block as the file holds it, in the buffer that all blocks share."""
        block = self.blocks[index]
        buffer = self._buffer[: block.nbytes]
        read_into(self._files[block.file], buffer, block.start, block.file)
        return buffer

    def _write(self, index: int, buffer: Tensor) -> None:
        block = self.blocks[index]
        self._disk.write(self._files[block.file], octets(buffer), block.start)
        self._disk.sync(self._files[block.file])

    def _keep_whole(self, buffer: Tensor) -> None:
        """Put what is about to be written beside its place first."""
        if self._slot is None:
            self._disk.create(self._slot_path)
            self._slot = _open_to_write(self._slot_path, self._opened)
        self._disk.write(self._slot, octets(buffer), 0)
        self._disk.sync(self._slot)

    def _kept_whole(self, index: int) -> Tensor | None:
        nbytes = self.blocks[index].nbytes
        if self._slot is None or os.fstat(self._slot).st_size < nbytes:
            return None
        buffer = self._buffer[:nbytes]
        read_into(self._slot, buffer, 0, BLOCK_NAME)
        return buffer

    def _lost(self, index: int) -> IA3Error:
        block = self.blocks[index]
        return IA3Error(
            f"{block.tensor!r} in {self.folder / block.file} was changed since it was merged, so that the merge cannot "
            "be undone; put the file back as it was, or get the model again."
        )

    def settle(self) -> None:
        """Write the block again of which an interrupted run may have written a part."""
        journal = self.journal
        if journal.lowest is not None:
            self._settle(journal.lowest, wanted=journal.records[journal.lowest].before)
        elif journal.records:
            journal.drop_rest()
            last = len(journal.records) - 1
            if not self._settle(last, wanted=journal.records[last].after):
                journal.drop_last()

    def _settle(self, index: int, wanted: int) -> bool:
        """Whether the block is now the wanted one; else it is untouched, as it was before this step."""
        record = self.journal.records[index]
        found = checksum(self.read(index))
        if found == wanted:
            return True
        whole = self._kept_whole(index)
        if whole is not None and checksum(whole) == wanted:
            self._write(index, whole)
            return True
        if found not in (record.before, record.after):
            raise self._lost(index)
        return False

    def check(self) -> bool:
        """Whether every block with a record is merged; raises where one is neither merged nor as it was."""
        found = True
        for index, record in enumerate(self.journal.records):
            state = checksum(self.read(index))
            if state not in (record.before, record.after):
                raise self._lost(index)
            found = found and state == record.after
        return found

    def merge(self, vectors: dict[str, Tensor], advance: Advance) -> None:
        """Merge the blocks that have no record yet."""
        for index in range(len(self.journal.records), len(self.blocks)):
            buffer = self.read(index)
            before = checksum(buffer)
            residual = exact.merge(self.blocks[index], buffer, vectors)
            self._keep_whole(buffer)
            self.journal.append(before, checksum(buffer), residual)
            self._write(index, buffer)
            advance(len(buffer))

    def restore(self, advance: Advance) -> None:
        """Restore every block that has a record, last one first; blocks that are as they were stay."""
        journal = self.journal
        first = len(journal.records) - 1 if journal.lowest is None else journal.lowest
        for index in range(first, -1, -1):
            buffer, record = self.read(index), journal.records[index]
            if checksum(buffer) != record.before:
                if checksum(buffer) != record.after:
                    raise self._lost(index)
                exact.restore(self.blocks[index], buffer, journal.vectors, journal.residual(index))
                if checksum(buffer) != record.before:
                    raise self._lost(index)
                self._keep_whole(buffer)
                journal.mark(index)
                self._write(index, buffer)
            advance(len(buffer))

    def keep(self) -> None:
        """End a merge: the journal becomes what undoes it."""
        self._disk.remove(self._slot_path)
        self.journal.rename(self.folder / KEPT_NAME)

    def discard(self) -> None:
        """End a restoring: nothing stays."""
        self._disk.remove(self._slot_path)
        self._disk.remove(self.journal.path)


def _open_to_write(path: Path, files: ExitStack) -> int:
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        raise IA3Error(f"{path} cannot be written: {error.strerror or error}; nothing was changed.") from None
    files.callback(os.close, file)
    return file


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from merging in the folder meanwhile."""
    with open_to_read(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IA3Error(f"another process is merging in {folder}; wait until it is done.") from None
        with one_thread():
            yield


@contextmanager
def _opened(folder: Path, name: str, disk: Disk) -> Iterator[_Job]:
    with ExitStack() as files:
        journal = Journal(folder / name, disk)
        files.callback(journal.close)
        yield _Job(folder, journal, disk, files)


# --- merging -----------------------------------------------------------------------------------------------------


def prepare(folder: Path, adapter: Path, block_bytes: int = BLOCK_BYTES) -> tuple[Checkpoint, MergePlan]:
    """Read what is there and plan what will be; raises :class:`IA3Error` for whatever is wrong, with the files too."""
    checkpoint = read_checkpoint(folder)
    plan = plan_merge(checkpoint, adapter).in_pieces(block_bytes)
    refuse_merged(folder)
    if (folder / "adapter_config.json").exists():
        raise IA3Error(
            f"{folder} holds an adapter_config.json, by which transformers would apply that adapter to the merged "
            "weights again; keep adapters in a folder of their own."
        )
    for name in sorted({block.file for block in plan.blocks}):
        _check_own_file(folder / name)
    if not os.access(folder, os.W_OK):
        raise IA3Error(f"{folder} cannot be written, and the merge's journal has to lie in it; make it writable.")
    needed = 2 * block_bytes + sum(map(exact.nbytes_estimate, plan.blocks)) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free and not is_interrupted(folder):
        raise IA3Error(f"the merge's journal needs {needed:,} bytes in {folder}, where {free:,} are free; make room.")
    return checkpoint, plan


def _check_own_file(path: Path) -> None:
    """Raise where writing to a file would change another's, or what its owner protects."""
    if path.is_symlink():
        raise IA3Error(
            f"{path} is a link into {path.resolve().parent}, a cache that other models may share; copy the folder "
            "(`cp -rL`), or merge with --out."
        )
    status = path.stat()
    if status.st_nlink > 1:
        raise IA3Error(f"{path} has {status.st_nlink} names (hard links), all of which would change; copy the folder.")
    if not status.st_mode & 0o222 or not os.access(path, os.W_OK):
        raise IA3Error(f"{path} is read-only; make it writable, or merge with --out.")


def merge_in_place(
    folder: Path,
    adapter: Path,
    *,
    verify: bool = False,
    advance: Advance = lambda count: None,
    say: Say = lambda sentence: None,
    disk: Disk | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Summary:
    """Merge an adapter into the weights in ``folder``, and keep there what ``unmerge`` needs.

    An interrupted merge of the same adapter is finished; one of another adapter is undone first. verify: read
    everything again and compare. advance: told of bytes as they are done; say: of what was found half-done.

    Raises :class:`IA3Error`; the weights are then as they were, or it says that they are not.
    """
    disk = disk or Disk()
    with _alone_in(folder) if folder.is_dir() else ExitStack():
        checkpoint, plan = prepare(folder, adapter, block_bytes)
        job = _describe(checkpoint, plan)
        if is_interrupted(folder) and not _can_go_on(folder, job, disk):
            say("an interrupted merge is undone first")
            _finish_restoring(folder, disk)
        elif is_interrupted(folder):
            say("an interrupted merge is finished")
        others = _other_checksums(checkpoint, plan) if verify else None
        try:
            if not is_interrupted(folder):
                scales = {block.vector: plan.vectors[block.vector] for block in plan.blocks if block.dim >= 0}
                Journal.create(folder / JOURNAL_NAME, job, scales, disk).close()
            with _opened(folder, JOURNAL_NAME, disk) as work:
                work.settle()
                advance(sum(block.nbytes for block in work.blocks[: len(work.journal.records)]))
                work.merge(plan.vectors, advance)
                work.keep()
        except BaseException as error:
            _undo(folder, disk, error)
            raise
        if others is not None:
            _verify(checkpoint, plan, others, disk)
    return summarize(checkpoint, plan, 0)


def _describe(checkpoint: Checkpoint, plan: MergePlan) -> dict[str, Any]:
    """What a journal says about a merge."""
    changed = {block.file for block in plan.blocks}
    return {
        "adapter": str(plan.adapter.resolve()),
        "config": plan.config.to_json(),
        "digest": plan.digest(),
        "shards": [
            {"name": shard.path.name, "size": shard.size, "header_checksum": shard.header_checksum}
            for shard in checkpoint.shards
            if shard.path.name in changed
        ],
        "blocks": [asdict(block) for block in plan.blocks],
    }


def _can_go_on(folder: Path, job: dict[str, Any], disk: Disk) -> bool:
    """Whether the interrupted merge in a folder is this one, with all that it did still there."""
    with _opened(folder, JOURNAL_NAME, disk) as work:
        work.settle()
        return work.journal.lowest is None and work.journal.job["digest"] == job["digest"] and work.check()


def _undo(folder: Path, disk: Disk, error: BaseException) -> None:
    """Leave the weights as they were after an error; where that fails too, say so."""
    try:
        if is_interrupted(folder):
            _finish_restoring(folder, disk)
        disk.remove(folder / SCRATCH_NAME)
    except BaseException as second:
        raise IA3Error(
            f"merging into {folder} stopped half-way ({_reason(error)}), and so did undoing it ({_reason(second)}); "
            f"type `ia3 unmerge {folder}` to restore the weights."
        ) from error
    if isinstance(error, OSError):
        raise IA3Error(f"merging into {folder} failed ({_reason(error)}); its weights are as they were.") from error


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")


def _finish_restoring(folder: Path, disk: Disk, advance: Advance = lambda count: None) -> dict[str, Any]:
    """Undo what the journal in a folder says, and remove it; returns what it said about the merge."""
    with _opened(folder, JOURNAL_NAME, disk) as work:
        work.settle()
        work.check()
        work.restore(advance)
        work.discard()
        return work.journal.job


# --- undoing -----------------------------------------------------------------------------------------------------


def unmerge(folder: Path, *, advance: Advance = lambda count: None, disk: Disk | None = None) -> dict[str, Any]:
    """Restore every byte that a merge in place changed, whether it was finished or interrupted.

    Every changed byte is checked before one is restored; the rest of the files may have changed since. Returns what the
    journal said about the merge. Raises :class:`IA3Error`.
    """
    disk = disk or Disk()
    if not folder.is_dir():
        raise IA3Error(f"{folder} is no folder; name the folder of a model that an adapter was merged into.")
    with _alone_in(folder):
        if not is_interrupted(folder):
            disk.remove(folder / SCRATCH_NAME)
            if not (folder / KEPT_NAME).exists():
                raise IA3Error(
                    f"no adapter is merged into {folder} (there is no {KEPT_NAME}); only what `ia3 merge --in-place` "
                    "merged can be undone."
                )
            with _opened(folder, KEPT_NAME, disk) as work:
                work.check()
                work.journal.rename(folder / JOURNAL_NAME)
        return _finish_restoring(folder, disk, advance)


# --- the check ---------------------------------------------------------------------------------------------------


def _other_checksums(checkpoint: Checkpoint, plan: MergePlan) -> list[int]:
    """A checksum for each shard, of its bytes outside of the blocks."""
    sums = []
    buffer = new_buffer([], BLOCK_BYTES)
    for shard in checkpoint.shards:
        state = 0
        with open_to_read(shard.path) as file:
            for block, start, stop in segments(shard, plan.of_file(shard.path.name)):
                for first in range(start, stop, BLOCK_BYTES) if block is None else ():
                    piece = buffer[: min(BLOCK_BYTES, stop - first)]
                    read_into(file, piece, first, str(shard.path))
                    state = zlib.crc32(octets(piece), state)
        sums.append(state)
    return sums


def _verify(checkpoint: Checkpoint, plan: MergePlan, others: list[int], disk: Disk) -> None:
    """Read the merged files again: every block restored in memory, checked, and scaled again by torch."""
    folder = checkpoint.folder
    with _opened(folder, KEPT_NAME, disk) as work:
        for index, block in enumerate(work.blocks):
            record, buffer = work.journal.records[index], work.read(index)
            merged = buffer.clone()
            exact.restore(block, buffer, work.journal.vectors, work.journal.residual(index))
            is_restored = checksum(buffer) == record.before
            block.apply_by_reference(buffer, plan.vectors)
            if not is_restored or not same_values(block.matrix(buffer), block.matrix(merged)):
                raise IA3Error(
                    f"{block.tensor!r} in {folder / block.file} is not what it should be after the merge; type `ia3 "
                    f"unmerge {folder}` and check the disk."
                )
    if _other_checksums(checkpoint, plan) != others:
        raise IA3Error(f"bytes of {folder} changed that no vector scales; type `ia3 unmerge {folder}`, check the disk.")
