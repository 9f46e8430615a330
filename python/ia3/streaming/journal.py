"""The journal of a merge in place: enough on the disk, at every moment, to finish or to undo it.

A folder's weights are changed block after block. For each block the journal gets, before a byte of the weights is
overwritten, what brings the old block back (the residual of an exact merge, about a bit a weight) with checksums of the
old and the new block; and a file beside it gets the new block whole, so that a block of which a part was written can be
written again. Then both are forced to the disk, then the block is written and forced to the disk.

Once every block is written, the journal is renamed to the file that is kept, and ``ia3 unmerge`` renames it back and
restores block after block, last one first, by the same rules: undoing a finished merge and an interrupted one is one
piece of code. The kept file is not named ``*.safetensors`` because inference engines load all files so named.

The journal's parts, in order: MAGIC, length and CRC of the header; the header (a safetensors blob: the scales, and the
job as JSON in its metadata); a table with a mark for each block, zeros until it is restored; records, appended.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import IA3Error
from .blocks import WRITE_BYTES
from .state import SCRATCH_NAME

_MAGIC = b"IA3MERG1"
_PREFIX = struct.Struct("<8sQI")  # magic, length and checksum of the header
_MARK = struct.Struct("<4sIII")  # magic, block, checksum of the restored block, checksum of these
_RECORD = struct.Struct("<4sIIIQII")  # magic, block, checksums old and new, payload's length and checksum, of these
_MARK_MAGIC, _RECORD_MAGIC = b"BACK", b"DONE"


class Disk:
    """The operations that change files, each of which is done when it returns, but for ``write``: that needs ``sync``.

    A test puts another in its place, which stops at a chosen operation, or forgets what was not forced to the disk.
    """

    def create(self, path: Path) -> None:
        """Make an empty file."""
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644))
        self._sync_folder(path.parent)

    def write(self, file: int, data: memoryview | bytes, start: int) -> None:
        """Write bytes at a place of an open file."""
        view = memoryview(data)
        while view:
            count = os.pwrite(file, view[:WRITE_BYTES], start)
            view, start = view[count:], start + count

    def sync(self, file: int) -> None:
        """Force what was written to an open file to the disk."""
        os.fsync(file)

    def truncate(self, file: int, size: int) -> None:
        """Cut an open file."""
        os.ftruncate(file, size)
        os.fsync(file)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file within its folder."""
        os.replace(old, new)
        self._sync_folder(new.parent)

    def remove(self, path: Path) -> None:
        """Remove a file, where there is one."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._sync_folder(path.parent)

    def _sync_folder(self, folder: Path) -> None:
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


@dataclass(frozen=True)
class Record:
    """A block that was merged, or is about to be: its checksums before and after, and where its residual is."""

    before: int
    after: int
    start: int
    nbytes: int
    checksum: int


class Journal:
    """An open journal. ``records[i]`` is about block ``i``; ``restored`` are the blocks that are as before, or will be.

    ``lowest`` is the block that was being restored when a restoring stopped.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        """Open a journal; raises :class:`IA3Error` where it is damaged."""
        self.path, self._disk = path, disk
        try:
            self._file = os.open(path, os.O_RDWR)
        except OSError as error:
            raise IA3Error(f"{path} cannot be opened: {error.strerror or error}; make it writable.") from None
        try:
            self._read_header()
            self._read_records()
            self._read_marks()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, job: dict[str, Any], vectors: dict[str, Tensor], disk: Disk) -> Journal:
        """Write a journal without records for a job with ``job["blocks"]``; it appears whole."""
        header = save(vectors, metadata={"job": json.dumps(job)})
        scratch = path.with_name(SCRATCH_NAME)
        disk.create(scratch)
        file = os.open(scratch, os.O_RDWR)
        try:
            disk.write(file, _PREFIX.pack(_MAGIC, len(header), zlib.crc32(header)) + header, 0)
            disk.write(file, bytes(_MARK.size * len(job["blocks"])), _PREFIX.size + len(header))
            disk.sync(file)
        finally:
            os.close(file)
        disk.rename(scratch, path)
        return cls(path, disk)

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._file)

    def rename(self, path: Path) -> None:
        """Give the open journal another name, in the same folder."""
        self._disk.rename(self.path, path)
        self.path = path

    # --- reading ---

    def _damaged(self, what: str) -> IA3Error:
        return IA3Error(f"{self.path} is damaged ({what}), so that it cannot be undone with it; get the model again.")

    def _read_header(self) -> None:
        prefix = os.pread(self._file, _PREFIX.size, 0)
        if len(prefix) < _PREFIX.size or prefix[:8] != _MAGIC:
            raise self._damaged("it does not begin as a journal does")
        _, length, checksum = _PREFIX.unpack(prefix)
        header = os.pread(self._file, length, _PREFIX.size)
        if len(header) != length or zlib.crc32(header) != checksum:
            raise self._damaged("its header fails its checksum")
        self.vectors = load(header)
        entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        self.job: dict[str, Any] = json.loads(entries["__metadata__"]["job"])
        self._table = _PREFIX.size + length
        self._end = self._table + _MARK.size * len(self.job["blocks"])

    def _read_records(self) -> None:
        self.records: list[Record] = []
        size = os.fstat(self._file).st_size
        while len(self.records) < len(self.job["blocks"]):
            head = os.pread(self._file, _RECORD.size, self._end)
            if len(head) < _RECORD.size or zlib.crc32(head[:-4]) != _RECORD.unpack(head)[-1]:
                break
            magic, index, before, after, nbytes, checksum, _ = _RECORD.unpack(head)
            start = self._end + _RECORD.size
            if magic != _RECORD_MAGIC or index != len(self.records) or start + nbytes > size:
                break
            self.records.append(Record(before, after, start, nbytes, checksum))
            self._end = start + nbytes
        # The last record alone can be half-written: it was on the disk whole before its block was touched.
        if self.records and zlib.crc32(self._payload(self.records[-1])) != self.records[-1].checksum:
            self._forget_last()

    def _forget_last(self) -> None:
        last = self.records.pop()
        self._end = last.start - _RECORD.size

    def _read_marks(self) -> None:
        table = os.pread(self._file, _MARK.size * len(self.job["blocks"]), self._table)
        self.lowest: int | None = None
        for index, (magic, marked, before, checksum) in enumerate(_MARK.iter_unpack(table)):
            if (
                magic == _MARK_MAGIC
                and marked == index
                and self._mark(index, before)[-4:] == struct.pack("<I", checksum)
            ):
                self.lowest = index
                break

    def _payload(self, record: Record) -> bytes:
        return os.pread(self._file, record.nbytes, record.start)

    def residual(self, index: int) -> dict[str, Tensor]:
        """What brings block ``index`` back; raises :class:`IA3Error` where it is damaged."""
        payload = self._payload(self.records[index])
        if zlib.crc32(payload) != self.records[index].checksum:
            raise self._damaged(f"its record {index} fails its checksum")
        try:
            return load(payload)
        except (SafetensorError, ValueError) as error:
            raise self._damaged(f"its record {index} cannot be read: {error}") from None

    # --- writing ---

    def append(self, before: int, after: int, residual: dict[str, Tensor]) -> None:
        """Record that the next block is about to be merged, and force it to the disk."""
        payload = save(residual)
        head = _RECORD.pack(_RECORD_MAGIC, len(self.records), before, after, len(payload), zlib.crc32(payload), 0)[:-4]
        head += struct.pack("<I", zlib.crc32(head))
        record = Record(before, after, self._end + len(head), len(payload), zlib.crc32(payload))
        self._disk.write(self._file, head, self._end)
        self._disk.write(self._file, payload, record.start)
        self._disk.sync(self._file)
        self.records.append(record)
        self._end = record.start + record.nbytes

    def drop_last(self) -> None:
        """Take the last record back: its block was never written."""
        self._forget_last()
        self.drop_rest()

    def drop_rest(self) -> None:
        """Cut off what follows the last whole record."""
        if os.fstat(self._file).st_size > self._end:
            self._disk.truncate(self._file, self._end)

    def mark(self, index: int) -> None:
        """Record that block ``index`` is about to be restored, and force it to the disk."""
        self._disk.write(self._file, self._mark(index, self.records[index].before), self._table + _MARK.size * index)
        self._disk.sync(self._file)
        self.lowest = index

    def _mark(self, index: int, before: int) -> bytes:
        head = _MARK.pack(_MARK_MAGIC, index, before, 0)[:-4]
        return head + struct.pack("<I", zlib.crc32(head))
