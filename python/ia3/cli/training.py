"""Training an adapter with transformers' Trainer: what it is told, and what it tells while it runs."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import TrainerState, TrainingArguments

from ..errors import IA3Error, reason_of
from ..files import files_in
from .boundary import Stopped, say, signals
from .data import IGNORED, Corpus


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Return the TrainingArguments that options such as `--warmup-steps 0.1` set. Raises IA3Error for others."""
    parser = transformers.HfArgumentParser(TrainingArguments, exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.set_defaults(**dict.fromkeys(field.dest for field in parser._actions))
    try:
        found, unknown = parser.parse_known_args(list(words))
    except (argparse.ArgumentError, SystemExit) as error:
        raise IA3Error(f"an option for transformers' Trainer does not fit: {error}.") from error
    if unknown:
        raise IA3Error(f"there is no option {unknown[0]}, here or in transformers' TrainingArguments.")
    return {name: value for name, value in vars(found).items() if value is not None}


def fit(
    model: Any, tokenizer: Any, corpus: Corpus, folder: Path, console: Console, resume: bool = False, **arguments: Any
) -> list[dict[str, Any]]:
    """Train the trainable parameters of `model`, on the device where it is, and return the Trainer's log.

    The log has `loss`, `eval_loss` (means over tokens, in nats), `step` and `seconds` where they were measured; the
    held-out loss at the beginning, after every fifth of the run, and at the end.

    folder: for checkpoints, a tenth of the run apart. resume: go on from the last of them, where there is one.
    console: where to tell how far it is.
    arguments: of `TrainingArguments`.

    Raises IA3Error if a number is no longer finite, and Stopped at Ctrl-C or SIGTERM, once the step's checkpoint is
    written.
    """
    defaults = {
        "output_dir": str(folder),
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "eval_strategy": "steps" if corpus.held_out else "no",
        "eval_steps": 1 / 5,  # of the run
        "save_strategy": "steps",
        "save_steps": 1 / 10,
        "save_total_limit": 2,  # a full disk may cut the last one short
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # else the Trainer would report a NaN as the loss before it
        "disable_tqdm": True,
    }
    use_cache = model.config.use_cache
    last = _last_checkpoint(folder) if resume else None
    watch = Watch(console)
    try:
        trainer = _Trainer(
            model=model,
            args=TrainingArguments(**(defaults | arguments), eval_on_start=bool(corpus.held_out) and last is None),
            train_dataset=corpus.train,
            eval_dataset=corpus.held_out or None,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            callbacks=[watch],
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # what it says of its own arguments
        raise IA3Error(f"transformers' Trainer refuses its options: {reason_of(error)}") from error
    trainer.remove_callback(transformers.PrinterCallback)
    try:
        with console.status("training") as watch.status, signals(watch.on_signal), contextlib.suppress(_Complete):
            trainer.train(resume_from_checkpoint=last)
    except OSError as error:
        raise IA3Error(f"a checkpoint could not be written to {folder}: {error}; the one before is whole.") from error
    finally:
        model.config.use_cache = use_cache  # the Trainer turned it off
        model.eval()
    return list(trainer.state.log_history)


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that is whole: the Trainer writes its state last."""
    names = re.compile(r"checkpoint-([0-9]{1,18})")
    found = {int(match[1]): path for path in folder.iterdir() if (match := names.fullmatch(path.name))}
    for _, path in sorted(found.items(), reverse=True):
        list(files_in(path))  # the Trainer reads whatever has the right name
        with contextlib.suppress(OSError, ValueError, TypeError):
            TrainerState.load_from_json(str(path / "trainer_state.json"))
            return str(path)
    return None


class _Trainer(transformers.Trainer):
    """transformers' Trainer, but its held-out loss is the mean over tokens; theirs is over batches of any lengths."""

    control: transformers.TrainerControl  # which their annotations lack

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        total, tokens = 0.0, 0
        self.model.eval()
        with torch.inference_mode():
            for inputs in self.get_eval_dataloader(eval_dataset):
                batch = self._prepare_inputs(inputs)
                # The label of a sequence's first token is never compared: nothing comes before it.
                learned = int((batch["labels"][:, 1:] != IGNORED).sum())
                total += self.model(**batch, use_cache=False).loss.item() * learned
                tokens += learned
        loss = total / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond what a float holds
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": perplexity}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Complete(Exception):
    """The checkpoint that training goes on from is of its last step."""


class Watch(transformers.TrainerCallback):
    """Tells how far training is, stops at what is not finite, and turns a signal into a last checkpoint."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status: Any = None  # what the console shows meanwhile, where somebody watches
        self.signal = 0
        self.begun: tuple[int, float] | None = None  # the steps done before, and the time
        self.started = self.seconds = self.told = 0.0  # when the step began, what it took, when a line was printed

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Let the first signal finish the step, and the second end it at once."""
        if self.signal:
            raise Stopped(number, "nothing of this step was kept.")
        self.signal = number
        say("Interrupted", "finishing the step; once more to stop at once.")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:  # the Trainer would do one more
            raise _Complete

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.monotonic()
        self.begun = self.begun or (state.global_step, self.started)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.monotonic() - self.started
        if self.signal:
            control.should_evaluate = False
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], model: Any, **_: Any) -> None:
        found = {"training loss": "loss", "held-out loss": "eval_loss", "gradient's norm": "grad_norm"}
        numbers = {what: logs[name] for what, name in found.items() if name in logs}
        if "loss" in logs:
            # A checkpoint of this step would keep them: gradients that were finite may have led to what is not.
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            if not all(bool(parameter.isfinite().all()) for parameter in trained):
                numbers["trained values"] = math.nan
        for what, number in numbers.items():
            if not math.isfinite(number):
                remedy = "try a smaller --learning-rate or --dtype float32"
                raise IA3Error(f"the {what} became {number} at step {state.global_step}; {remedy}.")
        if "loss" in logs:
            state.log_history[-1]["seconds"] = self.seconds
            self._tell(state, logs["loss"])

    def _tell(self, state: Any, loss: float) -> None:
        """Show the step, the loss and the time that is left; where nobody watches print them, a second apart."""
        now, (before, begun) = time.monotonic(), self.begun or (0, 0.0)
        pace = (now - begun) / (state.global_step - before)
        left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
        line = f"step {state.global_step}/{state.max_steps}, loss {loss:.3f}, {pace:.2f} s a step, {left} left"
        if self.console.is_terminal:
            self.status.update(line)
        elif now - self.told >= 1 or state.global_step == state.max_steps:
            self.told = now
            self.console.print(line, highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signal:
            kept = "is kept; the same command with --resume goes on." if args.save_strategy != "no" else "was the last."
            raise Stopped(self.signal, f"step {state.global_step} {kept}")
