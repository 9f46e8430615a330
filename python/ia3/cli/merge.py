"""`ia3 merge`: a copy of a checkpoint's files with an adapter in them."""

from __future__ import annotations

import os
from pathlib import Path

from rich import filesize
from rich.console import Console
from typer import Option

from ..errors import printable
from .boundary import Stopped


def run(
    base: Path = Option(metavar="FOLDER", help="The model that the adapter was trained on."),
    adapter: Path = Option(metavar="FOLDER", help="The adapter."),
    out: Path = Option(metavar="FOLDER", help="Folder to make for the merged model."),
    link: bool = Option(False, "--link", help="Hard links, not copies, for files that the adapter leaves alone."),
) -> None:
    """Merge an adapter into a copy of a model's safetensors files, tensor by tensor, without loading the model."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with console.status("importing torch"):
        from ..merging.checkpoint import plan_merge, write_merged
    plan = plan_merge(base, adapter, out)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=plan.checkpoint.nbytes)
            write_merged(plan, out, link=link, advance=lambda count: progress.advance(task, count))
        tensors, nbytes = len({change.entry for change in plan.changes}), sum(change.nbytes for change in plan.changes)
        print(f"Merged {tensors} tensors ({filesize.decimal(nbytes)}) into {printable(str(out))}.")
        if plan.checkpoint.left_out:
            names = ", ".join(str(path.relative_to(base)) for path in plan.checkpoint.left_out)
            print(f"Not merged, and not copied: {printable(names)}, which hold weights of their own.")
    except Stopped as stop:
        stop.sentence = f"{out} {'is whole' if os.path.lexists(out) else 'was not made'}."
        raise
