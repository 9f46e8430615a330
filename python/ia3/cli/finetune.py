"""`ia3 finetune`: from a model and data to a folder with an adapter, a loss curve and its numbers."""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer import Option

from ..errors import IA3Error
from ..files import atomic_folder, check_parent, follow
from . import options
from .boundary import Stopped

if TYPE_CHECKING:
    from rich.table import Table

    from . import checkpoints
    from . import data as reading
    from .training import Report

LOSS_CURVE, METRICS = "loss.png", "metrics.json"
MODULES = ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")


def _usage(source: checkpoints.Source) -> str:
    """Write the part of the model card that says how to load the adapter: its base is a place on this machine."""
    from_file = f', gguf_file="{source.gguf_file}"' if source.gguf_file else ""
    return f"""
## Use

Trained by `ia3 finetune` on `{source.path}`.

```python
from ia3 import AutoPeftModelForCausalLM  # or from peft

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder"{from_file})
```
"""


def _modules(value: str | None) -> list[str] | str | None:
    """Module names as IA3Config wants them: a list, a regular expression (given as `re:...`), or `all-linear`."""
    if value is None or value == "all-linear":
        return value
    if value.startswith("re:"):
        return value.removeprefix("re:")
    return [name.strip() for name in value.split(",") if name.strip()]


@dataclass(frozen=True)
class Finetune:
    """Train (IA)3 vectors on text or chats, and write adapter, loss curve and metrics to a folder.

    Every other option is for transformers' Trainer, as its TrainingArguments have it: --warmup-steps 0.1,
    --weight-decay 0.01, --max-grad-norm 0.5, --gradient-accumulation-steps 8, --lr-scheduler-type cosine,
    --report-to tensorboard, --save-steps 50, ...
    """

    context: typer.Context
    model: options.Model
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Text; or JSON, JSON Lines, CSV, TSV, Parquet or a saved datasets folder with 'text', or 'prompt' and "
            "'completion', or chat 'messages', of which only completions and answers are learned.",
        ),
    ]
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder to make for all that is written.")]
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint in the output folder.")] = False
    target_modules: Annotated[
        str | None,
        Option(
            metavar="NAMES",
            help="Layers that get a vector: NAME,NAME,... or re:REGEX or all-linear. Default: the model type's.",
        ),
    ] = None
    feedforward_modules: Annotated[
        str | None, Option(metavar="NAMES", help="Those whose input is scaled: NAME,NAME,... or re:REGEX.")
    ] = None
    exclude_modules: Annotated[
        str | None, Option(metavar="NAMES", help="Layers that get none: NAME,NAME,... or re:REGEX.")
    ] = None
    modules_to_save: Annotated[
        str | None, Option(metavar="NAMES", help="Further modules, trained and saved whole: NAME,NAME,...")
    ] = None
    fan_in_fan_out: Annotated[bool, Option("--fan-in-fan-out", help="The layers store (in, out), as GPT-2's do.")] = (
        False
    )
    random_init: Annotated[bool, Option("--random-init", help="Start at random values instead of ones.")] = False
    steps: Annotated[int | None, Option(callback=options.at_least(1), help="Optimizer steps; wins over --epochs.")] = (
        None
    )
    epochs: Annotated[float, Option(callback=options.positive, help="Passes over the data.")] = 3.0
    batch_size: Annotated[int, Option(callback=options.at_least(1), help="Sequences in a batch.")] = 4
    block_size: Annotated[int, Option(callback=options.at_least(2), help="Tokens in a sequence, at most.")] = 256
    learning_rate: Annotated[
        float, Option("--learning-rate", "--lr", callback=options.positive, help="The optimizer's: AdamW's.")
    ] = 1e-2
    held_out: Annotated[
        float,
        Option(callback=options.between(0, 1, open_high=True), help="Part of the data to measure on; 0 for none."),
    ] = 0.1
    load_in_4bit: options.FourBit = False
    dtype: options.Dtype = options.AUTO
    device: options.Device = "auto"
    seed: options.Seed = 0

    def run(self) -> None:
        """Train, and write what came of it; until then the output folder holds checkpoints."""
        from . import checkpoints
        from . import data as reading

        # What is cheap to check comes first: the imports and the model take many seconds.
        source = checkpoints.locate(self.model)
        check_output(self.output, self.resume)
        if source.gguf_file and self.load_in_4bit:
            raise IA3Error(f"--load-in-4bit is for a model folder, but {source.path} is a GGUF file; leave it out.")
        checkpoints.require(
            "ia3 finetune",
            *("accelerate", "matplotlib"),
            *(["gguf"] if source.gguf_file else []),
            *(["datasets"] if reading.needs_datasets(self.data) else []),
            *(["bitsandbytes"] if self.load_in_4bit else []),
        )
        rows = reading.read_rows(self.data)

        stderr = Console(stderr=True)
        with stderr.status("importing torch and transformers"):
            import transformers

            from .. import IA3Config, TaskType, get_peft_model
            from . import training

            settings = training.parse(self.context.args)
        device = checkpoints.pick_device(self.device)
        checkpoints.check_kernels(device)
        dtype = checkpoints.pick_dtype(self.dtype, device)
        with stderr.status(escape(f"loading {source.path}")):
            tokenizer, base = checkpoints.load(source, dtype, device, self.load_in_4bit)
            corpus = reading.prepare(
                rows, tokenizer, block_size=self.block_size, held_out=self.held_out, seed=self.seed
            )
            checkpoints.check_length(base, self.block_size, "--block-size")
            transformers.set_seed(self.seed)  # for vectors that do not start at one
            names: dict[str, Any] = {name: _modules(getattr(self, name)) for name in MODULES}
            flags: dict[str, Any] = {"fan_in_fan_out": self.fan_in_fan_out, "init_ia3_weights": not self.random_init}
            model = get_peft_model(base, IA3Config(task_type=TaskType.CAUSAL_LM, **names, **flags))
        if self.resume:
            checkpoints.warn_if_merged(base, self.output)
        batch = self.batch_size * settings.get("gradient_accumulation_steps", 1)
        arguments = {
            "max_steps": self.steps or training.step_count(corpus, batch, self.epochs),
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant_with_warmup" if settings.get("warmup_steps") else "constant",
            "seed": self.seed,
        }
        try:
            with training_bar(stderr) as report:
                log = training.fit(model, tokenizer, corpus, self.output, report, self.resume, **(arguments | settings))
            self._write(source, model, corpus, log, dtype)
        except (KeyboardInterrupt, Stopped) as stop:
            if not (self.output / METRICS).exists():
                raise
            raise Stopped(getattr(stop, "number", signal.SIGINT), f"{self.output} is whole.") from None
        finally:
            if self.output.is_dir() and not any(self.output.iterdir()):
                self.output.rmdir()

    def _write(
        self, source: checkpoints.Source, model: Any, corpus: reading.Corpus, log: list[dict[str, Any]], dtype: Any
    ) -> None:
        from .plot import loss_curve

        metrics = _metrics(self, model, corpus, log) | {"dtype": str(dtype).removeprefix("torch.")}
        subtitle = f"{self.data.name}, {metrics['trainable_parameters']:,} trained parameters, {metrics['dtype']}"
        picture = loss_curve(log, f"IA3 on {source.path.name}", subtitle)
        with atomic_folder(self.output) as folder:
            model.save_pretrained(str(folder))
            card = folder / "README.md"
            card.write_text(card.read_text("utf-8") + _usage(source), encoding="utf-8")
            (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            (folder / LOSS_CURVE).write_bytes(picture)
        console = Console()
        console.print(_summary(self, metrics))
        example = shlex.join(["ia3", "generate", str(self.model), "--adapter", str(self.output), "--prompt", "..."])
        console.print(f"Try it: {example}", markup=False, highlight=False, soft_wrap=True)


def check_output(output: Path, resume: bool = False) -> None:
    """Raise IA3Error if `output` cannot become a new folder, or is none with what an earlier run left to resume."""
    output = follow(output)
    is_there = output.is_dir() and any(output.iterdir())
    if is_there and not resume:
        has_some = any(output.glob("checkpoint-*"))
        hint = "add --resume to go on from its last checkpoint, or name another" if has_some else "name another"
        raise IA3Error(f"the output folder {output} is not empty; {hint}, or empty it first.")
    if resume and not any(output.glob("checkpoint-*")):
        raise IA3Error(f"there is no checkpoint in {output} to go on from; leave --resume out.")
    if output.exists() and not output.is_dir():
        raise IA3Error(f"the output {output} is a file; --output names a folder to make.")
    check_parent(output)


@contextmanager
def training_bar(console: Console) -> Iterator[Report]:
    """Show how far training is, or where nobody watches print a line a step (a second apart); yield what tells it."""
    begun: tuple[int, float] | None = None
    shown = 0.0
    with console.status("training") as status:

        def report(done: int, total: int, loss: float) -> None:
            nonlocal begun, shown
            now = time.monotonic()
            begun = begun or (done, now)
            line = f"step {done}/{total}, loss {loss:.3f}"
            if done > begun[0]:
                pace = (now - begun[1]) / (done - begun[0])
                line += f", {pace:.2f} s a step, {timedelta(seconds=round(pace * (total - done)))} left"
            if console.is_terminal:
                status.update(line)
            elif now - shown >= 1 or done == total:
                shown = now
                console.print(line, highlight=False)

        yield report


def _metrics(job: Finetune, model: Any, corpus: reading.Corpus, log: list[dict[str, Any]]) -> dict[str, Any]:
    from ia3_kernels import target

    trainable, parameters = model.get_nb_trainable_parameters()
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(job).items()}
    return given | {
        "context": job.context.args,  # for the Trainer
        "format": corpus.kind,  # `ia3 generate` prompts an adapter as it was trained
        "trainable_parameters": trainable,
        "parameters": parameters,
        "train_tokens": corpus.tokens("train"),
        "held_out_tokens": corpus.tokens("held_out"),
        "sequences_cut": corpus.cut,
        "log": log,
        "versions": {package: target.version(package) for package in ("torch", "transformers", "ia3-kernels")},
    }


def _summary(job: Finetune, metrics: dict[str, Any]) -> Table:
    from statistics import median

    from rich.table import Table

    log = metrics["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    perplexities = [entry["eval_perplexity"] for entry in log if "eval_perplexity" in entry]
    seconds = [entry["seconds"] for entry in log if "loss" in entry and entry["seconds"]]  # of this run, if resumed
    table = Table(title="IA3 fine-tune", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path stays whole
    table.add_row("trained", f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters")
    table.add_row("data", f"{metrics['train_tokens']:,} tokens, {metrics['held_out_tokens']:,} held out")
    if metrics["sequences_cut"]:
        table.add_row("cut to the block size", f"{metrics['sequences_cut']:,} sequences")
    for name, values in (("held-out loss", held_out), ("perplexity", perplexities), ("training loss", losses)):
        if values:
            table.add_row(name, f"{values[0]:.4f} -> {values[-1]:.4f}")
    pace = f", {median(seconds):.3f} s each" if seconds else ""
    table.add_row("steps", f"{len(losses)}{pace}, {metrics['dtype']}")
    table.add_row("written", escape(f"{job.output} (adapter, {LOSS_CURVE}, {METRICS})"))
    return table
