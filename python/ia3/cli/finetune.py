"""`ia3 finetune`: from a model and a file of text to a folder with an adapter, a loss curve and its numbers."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import IA3Error
from ..files import atomic_folder
from . import checkpoints, data
from .options import TrainingOptions

if TYPE_CHECKING:
    from .. import IA3Model
    from .training import History
    from .training import Progress as Report

LOSS_CURVE = "loss.png"
METRICS = "metrics.json"


@dataclass(frozen=True)
class Job:
    """One call of `ia3 finetune`."""

    model: Path
    data: Path
    output: Path
    adapter: dict[str, Any]  # arguments of IA3Config
    training: TrainingOptions
    block_size: int
    held_out: float
    dtype: str
    device: str


def run(job: Job) -> None:
    """Trains an adapter and writes it with its loss curve and metrics to `job.output`, all together or not at all."""
    # What is cheap to check comes first: the imports and the model take many seconds.
    check_output(job.output)
    checkpoints.require("accelerate", "training")
    checkpoints.require("matplotlib", "drawing the loss curve")
    source = checkpoints.locate(job.model)
    records = data.read_records(job.data)

    stderr = Console(stderr=True)
    with stderr.status("importing torch and transformers"):
        import torch
        import transformers

        from .. import IA3Config, TaskType, get_peft_model
        from .plot import loss_curve
        from .training import train

    device = checkpoints.pick_device(job.device)
    dtype = getattr(torch, job.dtype)
    checkpoints.check_kernels(device, dtype)
    with stderr.status(escape(f"reading {job.data}")):
        tokenizer = checkpoints.load_tokenizer(source)
        corpus = data.prepare(
            records, tokenizer, block_size=job.block_size, held_out=job.held_out, seed=job.training.seed
        )
    with stderr.status(escape(f"loading {source.path}")):
        base = checkpoints.load_model(source, dtype, device)
        checkpoints.check_vocabulary(base, tokenizer)
        checkpoints.check_length(base, job.block_size, "--block-size")
        transformers.set_seed(job.training.seed)  # for vectors that do not start at one
        model = get_peft_model(base, IA3Config(task_type=TaskType.CAUSAL_LM, **job.adapter))
    with training_bar(stderr) as report:
        history = train(model, corpus, job.training, checkpoints.pad_token(tokenizer), report)
    metrics = _metrics(job, model, corpus, history)
    subtitle = f"{job.data.name}, {metrics['trainable_parameters']:,} trained parameters, {job.dtype}"
    picture = loss_curve(history, f"IA3 on {job.model.resolve().name}", subtitle)
    with atomic_folder(job.output) as folder:
        model.save_pretrained(str(folder))
        (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (folder / LOSS_CURVE).write_bytes(picture)
    Console().print(_summary(job, metrics))


def check_output(output: Path) -> None:
    """Raises IA3Error if a new folder cannot come to stand at `output`; an empty one may already be there."""
    if output.is_dir() and any(output.iterdir()):
        raise IA3Error(f"the output folder {output} is not empty; name another, or empty it first.")
    if output.exists() and not output.is_dir():
        raise IA3Error(f"the output {output} is a file; --output names a folder to make.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise IA3Error(f"the output {output} cannot be made: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise IA3Error(f"the output {output} cannot be made: {parent} may not be written to.")


@contextmanager
def training_bar(console: Console) -> Iterator[Report]:
    """Shows a progress bar and yields what `train` reports to."""
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, loss="-")

        def report(done: int, total: int, loss: float) -> None:
            progress.update(task, completed=done, total=total, loss=f"{loss:.3f}")

        yield report


def _metrics(job: Job, model: IA3Model, corpus: data.Corpus, history: History) -> dict[str, Any]:
    from ia3_kernels import target

    trainable, parameters = model.get_nb_trainable_parameters()
    return {
        "model": str(job.model),
        "data": str(job.data),
        "dtype": job.dtype,
        "block_size": job.block_size,
        "held_out": job.held_out,
        "training": asdict(job.training),
        "trainable_parameters": trainable,
        "parameters": parameters,
        "train_sequences": len(corpus.train),
        "train_tokens": corpus.train_tokens,
        "held_out_sequences": len(corpus.held_out),
        "held_out_tokens": corpus.held_out_tokens,
        "sequences_cut": corpus.cut,
        "train_loss": [loss for _, loss in history.train],
        "held_out_loss": [{"step": step, "loss": loss} for step, loss in history.held_out],
        "median_step_seconds": statistics.median(history.step_seconds),
        "versions": {package: target.version(package) for package in ("torch", "transformers", "ia3-kernels")},
    }


def _summary(job: Job, metrics: dict[str, Any]) -> Table:
    table = Table(title="IA3 fine-tune", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path stays whole
    held_out = metrics["held_out_loss"]
    table.add_row("trained", f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters")
    table.add_row("data", f"{metrics['train_tokens']:,} tokens, {metrics['held_out_tokens']:,} held out")
    if metrics["sequences_cut"]:
        table.add_row("cut to the block size", f"{metrics['sequences_cut']:,} pairs")
    if held_out:
        table.add_row("held-out loss", f"{held_out[0]['loss']:.4f} -> {held_out[-1]['loss']:.4f}")
    table.add_row("training loss", f"{metrics['train_loss'][0]:.4f} -> {metrics['train_loss'][-1]:.4f}")
    table.add_row("steps", f"{len(metrics['train_loss'])}, {metrics['median_step_seconds']:.3f} s each")
    table.add_row("written", escape(f"{job.output} (adapter, {LOSS_CURVE}, {METRICS})"))
    return table
