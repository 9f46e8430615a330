"""A block merged so that it can be restored: the residual as named tensors, which a file can hold."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import ia3_kernels

from .blocks import Block, checksum

# What the residual of an exact merge consists of; see ia3_kernels.merge_.
_PARTS = ("parity", "positions", "bits")
_ORIGINAL = "original"


def merge(block: Block, buffer: Tensor, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scale or replace the block in ``buffer`` in place; returns what :func:`restore` needs.

    That is the residual of an exact merge where it is smaller than the block, and restores it: tried at once, on a
    copy. Else it is the block itself.
    """
    original = buffer[: block.nbytes].clone()
    if block.dim >= 0:
        merged = ia3_kernels.merge_(block.matrix(buffer), block.part(vectors), block.dim, exact=True)
        residual = {name: getattr(merged, name) for name in _PARTS}
        if sum(part.nbytes for part in residual.values()) < block.nbytes:
            attempt = buffer[: block.nbytes].clone()
            restore(block, attempt, vectors, residual)
            if checksum(attempt) == checksum(original):
                return residual
    else:
        block.apply(buffer, vectors)
    return {_ORIGINAL: original}


def restore(block: Block, buffer: Tensor, vectors: Mapping[str, Tensor], residual: Mapping[str, Tensor]) -> None:
    """Bring the block in ``buffer`` back, in place."""
    if _ORIGINAL in residual:
        buffer[: block.nbytes].copy_(residual[_ORIGINAL])
        return
    parts = ia3_kernels.Residual(*(residual[name] for name in _PARTS))
    ia3_kernels.unmerge_(block.matrix(buffer), block.part(vectors), block.dim, parts)


def nbytes_estimate(block: Block) -> int:
    """What a residual takes at least: a bit a weight, or the block itself where it is replaced."""
    if block.dim < 0:
        return block.nbytes
    return block.rows * (block.columns + 7) // 8
