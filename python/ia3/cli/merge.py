"""`ia3 merge` and `ia3 unmerge`: vectors into a checkpoint's files, and out of them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import IA3Error


def run(base: Path, adapter: Path, out: Path | None, in_place: bool, verify: bool) -> None:
    """Merges the adapter into a copy of the base at `out`, or into the base's own files. Raises IA3Error."""
    if (out is None) != in_place:
        raise IA3Error("give either --out FOLDER, for a merged copy, or --in-place, to change the base's own files.")
    with Console(stderr=True).status("importing torch"):
        from ..streaming import folder, patch
    if out is None:
        _, plan = patch.prepare(base, adapter)
        with _bar("merging", sum(block.nbytes for block in plan.blocks)) as advance:
            summary = patch.merge_in_place(base, adapter, verify=verify, advance=advance, say=_note)
        print(f"Merged {summary.tensors} tensors ({_size(summary.scaled_bytes)}) of {base} in place.")
        print(f"`ia3 unmerge {base}` restores every byte.")
    else:
        checkpoint, plan = folder.prepare(base, adapter, out)
        with _bar("merging", folder.total_bytes(checkpoint)) as advance:
            summary = folder.merge_folder(checkpoint, plan, out, advance)
        if verify:
            with _bar("verifying", sum(shard.size for shard in checkpoint.shards)) as advance:
                folder.verify_folder(checkpoint, plan, out, advance)
        print(f"Merged {summary.tensors} tensors ({_size(summary.scaled_bytes)}) into {out}.")
    if verify:
        others = f" and {summary.files} other files" if summary.files else ""
        print(
            f"Verified: they are what torch computes from the base's; the other {_size(summary.other_bytes)} of the "
            f"weights' files{others} are as in the base."
        )
    if summary.left_out:
        names = ", ".join(map(str, summary.left_out))
        print(f"Not merged{'' if in_place else ', and not copied'}: {names}, which hold weights of their own.")


def undo(base: Path) -> None:
    """Restores what `ia3 merge --in-place` changed in a folder. Raises IA3Error."""
    with Console(stderr=True).status("importing torch"):
        from ..streaming import patch
    with _bar("unmerging", None) as advance:
        job = patch.unmerge(base, advance=advance)
    print(f"{base} is as it was before {job['adapter']} was merged into it.")


def _note(sentence: str) -> None:
    Console(stderr=True).print(f"{sentence[0].upper()}{sentence[1:]}.", markup=False, highlight=False)


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"
