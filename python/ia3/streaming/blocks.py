"""The pieces that a tensor is scaled in: some rows of a matrix, small enough to keep memory low."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ia3_kernels import reference, scale_weight_

from ..errors import IA3Error
from .layout import FLOATS

# What one call writes. From 2 MiB on Linux may give a file pages of that size, and take six times as long to find them.
WRITE_BYTES = 512 << 10


@dataclass(frozen=True)
class Block:
    """A byte range of one file and what becomes of it.

    file, start: where it lies. rows, columns, dtype: the matrix that it holds, row after row.
    dim: 0, rows are scaled; 1, columns are scaled; -1, the bytes are replaced.
    vector, low, high: what by: this part of the named vector; when replacing, these elements of the named tensor.
    """

    file: str
    tensor: str
    start: int
    rows: int
    columns: int
    dtype: str
    dim: int
    vector: str
    low: int
    high: int

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return self.rows * self.columns * FLOATS[self.dtype].itemsize

    def pieces(self, limit: int) -> Iterator[Block]:
        """The block in pieces of whole rows that hold at most ``limit`` bytes each, or one row."""
        row = self.nbytes // max(self.rows, 1)
        step = max(limit // max(row, 1), 1)
        for first in range(0, self.rows, step):
            rows = min(step, self.rows - first)
            low, high = self.low, self.high
            if self.dim != 1:  # a part of the vector for each row, or of the replacement
                each = (high - low) // self.rows
                low, high = low + first * each, low + (first + rows) * each
            yield replace(self, start=self.start + first * row, rows=rows, low=low, high=high)

    def matrix(self, buffer: Tensor) -> Tensor:
        """The first bytes of ``buffer`` (uint8) as the block's matrix, uncopied."""
        return buffer[: self.nbytes].view(FLOATS[self.dtype]).view(self.rows, self.columns)

    def part(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """The part of the vector, or of the replacement, that belongs to the block."""
        return vectors[self.vector].reshape(-1)[self.low : self.high]

    def apply(self, buffer: Tensor, vectors: Mapping[str, Tensor]) -> None:
        """Scale or replace the block in ``buffer``, in place; one rounding."""
        if self.dim < 0:
            self.matrix(buffer).view(-1).copy_(self.part(vectors))
        else:
            scale_weight_(self.matrix(buffer), self.part(vectors), self.dim)

    def apply_by_reference(self, buffer: Tensor, vectors: Mapping[str, Tensor]) -> None:
        """What :meth:`apply` does, computed by torch instead of our kernels, to check them."""
        if self.dim < 0:
            self.apply(buffer, vectors)
        else:
            reference.scale_weight_(self.matrix(buffer), self.part(vectors), self.dim)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread meanwhile.

    A block in a processor's cache is scaled faster than it is read and written, and small blocks make other threads
    wait for each other more than they help: on a busy machine, twenty times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def octets(buffer: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, uncopied."""
    array: Any = buffer.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def new_buffer(blocks: list[Block], least: int = 0) -> Tensor:
    """Memory for the largest of the blocks, at least ``least`` bytes."""
    return torch.empty(max([least, *(block.nbytes for block in blocks)]), dtype=torch.uint8)


def read_into(file: int, buffer: Tensor, start: int, name: str) -> None:
    """Fill ``buffer`` (uint8) with the bytes of an open file from ``start`` on; raises :class:`IA3Error`."""
    view = octets(buffer)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], start + done)
        except OSError as error:
            raise IA3Error(f"{name} cannot be read: {error.strerror or error}; check the disk.") from error
        if not count:
            raise IA3Error(f"{name} ends after {start + done} bytes, and was longer before; leave it alone meanwhile.")
        done += count


def checksum(buffer: Tensor) -> int:
    """The CRC-32 of a buffer's bytes."""
    return zlib.crc32(octets(buffer))


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type agree in every bit, but for which of the NaNs a NaN is."""
    if torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
        return True
    return bool(((one == other) & (one.signbit() == other.signbit()) | (one.isnan() & other.isnan())).all())
