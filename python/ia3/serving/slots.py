"""The slots of a bank: which adapter's vectors are in which row of the layers' matrices, and where the others wait.

All of this is called with the bank's lock held. A row that a running batch reads is not written, and an adapter is
whole in its row before a batch can see it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import IA3Error
from ..files import open_file


@dataclass(frozen=True)
class BankReport:
    """What a bank holds and has done.

    capacity, resident, evicted, pinned, in_use: slots, and adapters by where they are.
    slot_bytes, host_bytes, file_bytes: of all slots, and of the evicted adapters in host memory and in files.
    hits, misses: adapters that batches asked for, found in a slot or brought back.
    evictions: adapters that had to leave their slot.
    """

    capacity: int
    resident: int
    evicted: int
    pinned: int
    in_use: int
    slot_bytes: int
    host_bytes: int
    file_bytes: int
    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True)
class _File:
    """An evicted adapter's file, in a folder that others may reach: what is read must be what was written."""

    path: Path
    size: int
    digest: bytes

    @classmethod
    def write(cls, folder: Path, vectors: Tensor) -> _File:
        """Write the vectors to a new file of a random name."""
        content = vectors.numpy().tobytes()
        name = ""
        try:
            descriptor, name = tempfile.mkstemp(dir=folder)
            with open(descriptor, "wb") as file:
                file.write(content)
        except OSError as error:
            if name:
                os.unlink(name)
            raise IA3Error(
                f"cannot write an evicted adapter into {folder}: {error.strerror}; free some space, or make a new bank."
            ) from error
        return cls(Path(name), len(content), hashlib.sha256(content).digest())

    def read(self) -> Tensor:
        """Return the vectors."""
        try:
            with open_file(self.path) as file:
                content = bytearray(file.read(self.size + 1))
            if hashlib.sha256(content).digest() != self.digest:
                raise OSError(0, "it is not what was written")
            return torch.frombuffer(content, dtype=torch.float32)
        except OSError as error:
            reason = error.strerror or error
            raise IA3Error(f"the evicted adapter in {self.path} cannot be read: {reason}; load it again.") from error


class Adapter:
    """One adapter: the slot it has, or its vectors elsewhere, and how many batches are running with it."""

    def __init__(self) -> None:
        self.slot: int | None = None
        self.vectors: Tensor | None = None  # all layers' side by side, fp32 on the host; only while it has no slot
        self.file: _File | None = None  # the same in a file, kept when it comes back: it never changes
        self.users = 0
        self.is_pinned = False
        self.is_listed = True  # else it is forgotten, or of one batch alone: the last user frees the slot


class Slots:
    """As many rows as ``capacity`` in each of ``matrices``, and the adapters that have them.

    host_limit, folder: where evicted adapters go; see :class:`~ia3.bank.AdapterBank`.
    """

    def __init__(self, capacity: int, host_limit: int | None) -> None:
        self.capacity = capacity
        self.folder: Path | None = None
        self.matrices: list[Tensor] = []  # fp32 [capacity, n], one for each layer
        self.hits = self.misses = self.evictions = 0
        self._host_limit, self._host_bytes = host_limit, 0
        self._queue: OrderedDict[Adapter, None] = OrderedDict()  # those with a slot, least recently used first
        self._free: list[int] = []  # of those that were used
        self._unused = 0  # the first of those that never were
        self._fences = _Fences()

    @property
    def entry_count(self) -> int:
        """Return how many entries an adapter's vectors have, all layers' together."""
        return sum(matrix.shape[1] for matrix in self.matrices)

    def enter(self, adapter: Adapter, vectors: Tensor, old: Adapter | None = None) -> None:
        """Give an adapter a slot with these vectors in it, the last to be evicted. Raises :class:`IA3Error`.

        old: whose vectors outside are not needed any more; that one may go there whose slot it gets.
        """
        outside = None if old is None else old.vectors
        if old is not None:
            self._drop_vectors(old)
        try:
            slot = self._free_slot()
            try:
                self._write(slot, vectors)
            except BaseException:
                self._free.append(slot)
                raise
        except BaseException:
            if old is not None and outside is not None:
                self._keep_vectors(old, outside)
            raise
        adapter.slot = slot
        self._queue[adapter] = None

    def bring(self, adapter: Adapter) -> None:
        """Give an adapter a slot if it has none, and the last place in the queue for eviction."""
        if adapter.slot is not None:
            self.hits += 1
            self._queue.move_to_end(adapter)
            return
        vectors = adapter.vectors if adapter.file is None else adapter.file.read()
        assert vectors is not None
        self.enter(adapter, vectors, adapter)
        self.misses += 1

    def release(self, adapter: Adapter) -> None:
        """Note that a batch no longer reads an adapter's slot, later on the device than what it has launched."""
        assert adapter.slot is not None
        self._fences.note_read(adapter.slot, self.matrices)
        adapter.users -= 1
        if not adapter.users and not adapter.is_listed:
            self._leave(adapter)

    def forget(self, adapter: Adapter) -> None:
        """Let go of an adapter: its slot, once no batch reads it, and what waits elsewhere."""
        adapter.is_listed = False
        if adapter.slot is not None and not adapter.users:
            self._leave(adapter)
        self._drop_vectors(adapter)
        if adapter.file is not None:
            with suppress(OSError):  # somebody else's doing
                adapter.file.path.unlink()

    def _free_slot(self) -> int:
        if not self._free and self._unused < self.capacity:
            self._free.append(self._unused)
            self._unused += 1
        if not self._free:
            self._evict()
        return self._free.pop()

    def _leave(self, adapter: Adapter) -> None:
        assert adapter.slot is not None
        self._free.append(adapter.slot)
        adapter.slot = None
        del self._queue[adapter]

    def _evict(self) -> None:
        """Free the slot of the least recently used adapter that may leave."""
        adapter = next((one for one in self._queue if not one.users and not one.is_pinned), None)
        if adapter is None:
            pinned = sum(one.is_pinned for one in self._queue)
            raise IA3Error(
                f"the bank has no slot left: of its {self.capacity}, {pinned} are pinned and the others in use by "
                "running batches; unpin or unload an adapter, run smaller batches, or make a bank of more capacity."
            )
        if adapter.file is None:
            vectors = torch.cat([matrix[adapter.slot].cpu() for matrix in self.matrices])
            if self.folder is None:
                self._check_host_limit(vectors)
                self._keep_vectors(adapter, vectors)
            else:
                adapter.file = _File.write(self.folder, vectors)
        self._leave(adapter)
        self.evictions += 1

    def _check_host_limit(self, vectors: Tensor) -> None:
        if self._host_limit is not None and self._host_bytes + vectors.nbytes > self._host_limit:
            raise IA3Error(
                f"evicted adapters take {self._host_bytes} bytes of host memory, and {vectors.nbytes} more are above "
                f"host_limit, {self._host_limit}; unload some, or give the bank a folder."
            )

    def _keep_vectors(self, adapter: Adapter, vectors: Tensor) -> None:
        adapter.vectors = vectors
        self._host_bytes += vectors.nbytes

    def _drop_vectors(self, adapter: Adapter) -> None:
        if adapter.vectors is not None:
            self._host_bytes -= adapter.vectors.nbytes
            adapter.vectors = None

    def _write(self, slot: int, vectors: Tensor) -> None:
        sizes = [matrix.shape[1] for matrix in self.matrices]
        if vectors.shape[0] < sum(sizes):  # read before the model got further layers, which it does not scale
            vectors = torch.cat([vectors, vectors.new_ones(sum(sizes) - vectors.shape[0])])
        parts = vectors.split(sizes)
        with self._fences.writing(slot, self.matrices), torch.no_grad():
            for matrix, part in zip(self.matrices, parts, strict=True):
                # Through .data: graphs that saved the matrix for backward read other rows of it.
                matrix.data[slot].copy_(part)


class _Fences:
    """Keeps writing a slot apart from reading it across CUDA streams; on a CPU calls follow each other anyway."""

    def __init__(self) -> None:
        self._read: dict[int, list[torch.cuda.Event]] = {}  # by slot: the ends of the batches that read it

    def note_read(self, slot: int, matrices: Sequence[Tensor]) -> None:
        """Let a later write of the slot wait for the kernels that this thread has launched so far."""
        devices = {matrix.device for matrix in matrices if matrix.is_cuda}
        if devices:
            running = [event for event in self._read.pop(slot, []) if not event.query()]
            self._read[slot] = running + [torch.cuda.current_stream(device).record_event() for device in devices]

    @contextmanager
    def writing(self, slot: int, matrices: Sequence[Tensor]) -> Iterator[None]:
        """Wait for the slot's readers before the copies into it, and for the copies at the end."""
        for event in self._read.pop(slot, []):
            event.synchronize()
        yield
        for device in {matrix.device for matrix in matrices if matrix.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
