"""`ia3 merge`: a copy of a checkpoint's files with an adapter in them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import printable
from .boundary import Stopped


def run(base: Path, adapter: Path, out: Path, link: bool) -> None:
    """Merges the adapter into a copy of the base at `out`. Raises IA3Error."""
    with Console(stderr=True).status("importing torch"):
        from ..merging.checkpoint import plan_merge, write_merged
    plan = plan_merge(base, adapter, out)
    try:
        with _bar("merging", plan.checkpoint.nbytes) as advance:
            write_merged(plan, out, link=link, advance=advance)
        tensors, nbytes = len({change.entry for change in plan.changes}), sum(change.nbytes for change in plan.changes)
        print(f"Merged {tensors} tensors ({_size(nbytes)}) into {printable(str(out))}.")
        if plan.checkpoint.left_out:
            names = ", ".join(str(path.relative_to(base)) for path in plan.checkpoint.left_out)
            print(f"Not merged, and not copied: {printable(names)}, which hold weights of their own.")
    except (KeyboardInterrupt, Stopped) as stop:
        what = "is whole" if os.path.lexists(out) else "was not made"
        raise Stopped(getattr(stop, "number", signal.SIGINT), f"{out} {what}.") from None


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"
