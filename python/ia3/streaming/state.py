"""Whether a merge into a folder's own files was made, or interrupted; asked by every command, so without torch."""

from __future__ import annotations

from pathlib import Path

from ..errors import IA3Error

JOURNAL_NAME = "ia3_merge.journal"
BLOCK_NAME = "ia3_merge.block"
KEPT_NAME = "ia3_merged.residual"
# A journal that is not whole yet; nothing was changed if it is there.
SCRATCH_NAME = "ia3_merge.new"


def is_interrupted(folder: Path) -> bool:
    """Whether a merge or its undoing stopped half-way in this folder."""
    return (folder / JOURNAL_NAME).exists()


def refuse_interrupted(folder: Path) -> None:
    """Raise :class:`IA3Error` where the weights in a folder are half-merged."""
    if is_interrupted(folder):
        raise IA3Error(
            f"a merge into {folder} was interrupted, and its weights are half-merged; type `ia3 unmerge {folder}` to "
            "restore them, or the same `ia3 merge --in-place` again to finish it."
        )


def refuse_merged(folder: Path) -> None:
    """Raise :class:`IA3Error` where an adapter is merged into the weights in a folder."""
    if (folder / KEPT_NAME).exists():
        raise IA3Error(
            f"an adapter is merged into {folder} already ({KEPT_NAME} keeps what undoes it); type `ia3 unmerge "
            f"{folder}` first."
        )
