"""`ia3 finetune`: from a model and data to a folder with an adapter, a loss curve and its numbers."""

from __future__ import annotations

import contextlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer import Argument, Option

from ..errors import IA3Error
from ..files import atomic_folder, check_parent, follow
from . import options
from .boundary import Stopped
from .options import at_least, within

if TYPE_CHECKING:
    from rich.table import Table

    from . import checkpoints
    from . import data as reading

LOSS_CURVE, METRICS = "loss.png", "metrics.json"
NAMES = "NAME,...|re:REGEX"
MODULES = ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")


@dataclass(frozen=True)
class Finetune:
    """Train (IA)3 vectors on text or chats, and write adapter, loss curve and metrics to a folder.

    Every other option is for transformers' Trainer, as its TrainingArguments have it: --warmup-steps 0.1,
    --weight-decay 0.01, --max-grad-norm 0.5, --gradient-accumulation-steps 8, --lr-scheduler-type cosine,
    --report-to tensorboard, --save-steps 50, ...
    """

    context: typer.Context
    model: options.Model
    data: Path = Argument(
        metavar="DATA",
        help="Text; or JSON, JSON Lines, CSV, TSV, Parquet or a saved datasets folder with 'text', or 'prompt' and "
        "'completion', or chat 'messages', of which only completions and answers are learned.",
    )
    output: Path = Option(..., "--output", "-o", metavar="DIR", help="Folder to make for all that is written.")
    resume: bool = Option(False, "--resume", help="Go on from the last checkpoint in the output folder.")
    target_modules: str | None = Option(
        None, metavar=NAMES, help="Layers that get a vector, or all-linear. Default: the model type's."
    )
    feedforward_modules: str | None = Option(None, metavar=NAMES, help="Those of them whose input is scaled.")
    exclude_modules: str | None = Option(None, metavar=NAMES, help="Layers that get none.")
    modules_to_save: str | None = Option(None, metavar="NAME,...", help="Further modules, trained and saved whole.")
    fan_in_fan_out: bool = Option(False, "--fan-in-fan-out", help="The layers store (in, out), as GPT-2's do.")
    random_init: bool = Option(False, "--random-init", help="Start at random values instead of ones.")
    steps: int | None = Option(None, callback=at_least(1), help="Optimizer steps; wins over --epochs.")
    epochs: float = Option(3.0, callback=within("(0, inf)"), help="Passes over the data.")
    batch_size: int = Option(4, callback=at_least(1), help="Sequences in a batch.")
    block_size: int = Option(256, callback=at_least(2), help="Tokens in a sequence, at most.")
    learning_rate: float = Option(
        1e-2, "--learning-rate", "--lr", callback=within("(0, inf)"), help="AdamW's step size."
    )
    held_out: float = Option(0.1, callback=within("[0, 1)"), help="Part of the data to measure on; 0 for none.")
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
            accelerate=True,
            matplotlib=True,
            gguf=bool(source.gguf_file),
            datasets=reading.needs_datasets(self.data),
            bitsandbytes=self.load_in_4bit,
        )
        rows = reading.read_rows(self.data)
        stderr = Console(stderr=True)
        with stderr.status("importing torch and transformers"):
            from . import training

            settings = training.parse(self.context.args)
        tokenizer, base = checkpoints.load_for(self, source, stderr)
        corpus = reading.prepare(rows, tokenizer, block_size=self.block_size, held_out=self.held_out, seed=self.seed)
        checkpoints.check_length(base, self.block_size, "--block-size")
        model = self._adapted(base)
        if self.resume:
            checkpoints.warn_if_merged(base, self.output)
        arguments = {
            "max_steps": self.steps or -1,  # -1: as many as the epochs have
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant_with_warmup" if settings.get("warmup_steps") else "constant",
            "seed": self.seed,
        }
        try:
            log = training.fit(model, tokenizer, corpus, self.output, stderr, self.resume, **(arguments | settings))
            self._write(source, model, corpus, log)
        except Stopped as stop:
            if (self.output / METRICS).exists():
                stop.sentence = f"{self.output} is whole."
            raise
        finally:
            with contextlib.suppress(OSError):  # it is not there, or holds something
                self.output.rmdir()

    def _adapted(self, base: Any) -> Any:
        """Return the model with an adapter to be trained."""
        from transformers import set_seed

        from .. import IA3Config, TaskType, get_peft_model

        set_seed(self.seed)  # for vectors that do not start at one
        names: dict[str, Any] = {name: _modules(getattr(self, name)) for name in MODULES}
        flags: dict[str, Any] = {"fan_in_fan_out": self.fan_in_fan_out, "init_ia3_weights": not self.random_init}
        return get_peft_model(base, IA3Config(task_type=TaskType.CAUSAL_LM, **names, **flags))

    def _write(self, source: checkpoints.Source, model: Any, corpus: reading.Corpus, log: list[dict[str, Any]]) -> None:
        from .plot import loss_curve

        metrics = _metrics(self, model, corpus, log)
        subtitle = f"{self.data.name}, {metrics['trainable_parameters']:,} trained parameters, {metrics['dtype']}"
        picture = loss_curve(log, f"IA3 on {source.path.name}", subtitle)
        with atomic_folder(self.output) as folder:
            model.save_pretrained(str(folder))
            card = folder / "README.md"
            card.write_text(card.read_text("utf-8") + _usage(source), encoding="utf-8")
            (folder / METRICS).write_text(json.dumps(metrics, indent=2, default=str) + "\n", encoding="utf-8")
            (folder / LOSS_CURVE).write_bytes(picture)
        console = Console()
        console.print(_summary(self, metrics))
        example = shlex.join(["ia3", "generate", str(self.model), "--adapter", str(self.output), "--prompt", "..."])
        console.print(f"Try it: {example}", markup=False, highlight=False, soft_wrap=True)


def check_output(output: Path, resume: bool = False) -> None:
    """Raise IA3Error if `output` cannot become a new folder, or is none with what an earlier run left to resume."""
    output = follow(output)
    if output.exists() and not output.is_dir():
        raise IA3Error(f"the output {output} is a file; --output names a folder to make.")
    has_checkpoint = any(output.glob("checkpoint-*"))
    if resume and not has_checkpoint:
        raise IA3Error(f"there is no checkpoint in {output} to go on from; leave --resume out.")
    if not resume and output.exists() and any(output.iterdir()):
        hint = "add --resume to go on from its last checkpoint, or name another" if has_checkpoint else "name another"
        raise IA3Error(f"the output folder {output} is not empty; {hint}, or empty it first.")
    check_parent(output)


def _modules(value: str | None) -> list[str] | str | None:
    """Return module names as IA3Config wants them: a list, a regular expression (given as `re:...`), `all-linear`."""
    if value is None or value == "all-linear":
        return value
    if value.startswith("re:"):
        return value.removeprefix("re:")
    return [name.strip() for name in value.split(",") if name.strip()]


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


def _metrics(job: Finetune, model: Any, corpus: reading.Corpus, log: list[dict[str, Any]]) -> dict[str, Any]:
    from ia3_kernels import target

    trainable, parameters = model.get_nb_trainable_parameters()
    return vars(job) | {
        "context": job.context.args,  # for the Trainer
        "format": corpus.kind,  # `ia3 generate` prompts an adapter as it was trained
        "trainable_parameters": trainable,
        "parameters": parameters,
        "train_tokens": corpus.tokens("train"),
        "held_out_tokens": corpus.tokens("held_out"),
        "sequences_cut": corpus.cut,
        "log": log,
        "dtype": str(model.get_base_model().dtype).removeprefix("torch."),
        "versions": {package: target.version(package) for package in ("torch", "transformers", "ia3-kernels")},
    }


def _summary(job: Finetune, metrics: dict[str, Any]) -> Table:
    from statistics import median

    from rich.table import Table

    def values(name: str) -> list[float]:
        return [entry[name] for entry in metrics["log"] if name in entry]

    rows = {
        "trained": f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters",
        "data": f"{metrics['train_tokens']:,} tokens, {metrics['held_out_tokens']:,} held out",
        "cut to the block size": f"{metrics['sequences_cut']:,} sequences",
    }
    for label, name in (("held-out loss", "eval_loss"), ("perplexity", "eval_perplexity"), ("training loss", "loss")):
        if found := values(name):
            rows[label] = f"{found[0]:.4f} -> {found[-1]:.4f}"
    pace = f", {median(values('seconds')):.3f} s each" if values("seconds") else ""
    rows["steps"] = f"{len(values('loss'))}{pace}, {metrics['dtype']}"
    rows["written"] = escape(f"{job.output} (adapter, {LOSS_CURVE}, {METRICS})")
    table = Table(title="IA3 fine-tune", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path stays whole
    for row in rows.items():
        table.add_row(*row)
    return table
