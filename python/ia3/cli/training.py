"""Training an adapter with transformers' Trainer: what it is told, and what it tells while it runs."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from ..errors import IA3Error, reason_of
from ..files import files_in
from .boundary import Stopped, say
from .data import IGNORED, Corpus

EVALUATIONS = 6  # of the held-out loss in a run, the first and the last step's included
CHECKPOINTS = 10
Report = Callable[[int, int, float], None]  # steps done, steps in all, the last step's loss


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Return the TrainingArguments that options such as `--warmup-steps 0.1` set. Raises IA3Error for others."""
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.set_defaults(**dict.fromkeys(field.dest for field in parser._actions))
    try:
        found, unknown = parser.parse_known_args(list(words))
    except (argparse.ArgumentError, SystemExit) as error:
        raise IA3Error(f"an option for transformers' Trainer does not fit: {error}.") from error
    if unknown:
        raise IA3Error(f"there is no option {unknown[0]}, here or in transformers' TrainingArguments.")
    return {name: value for name, value in vars(found).items() if value is not None}


def step_count(corpus: Corpus, batch: int, epochs: float) -> int:
    """Return how many steps of `batch` sequences make `epochs` passes over the training part."""
    return math.ceil(math.ceil(len(corpus.train) / batch) * epochs)


def fit(
    model: Any, tokenizer: Any, corpus: Corpus, folder: Path, report: Report, resume: bool = False, **arguments: Any
) -> list[dict[str, Any]]:
    """Train the trainable parameters of `model`, on the device where it is, and return the Trainer's log.

    The log has `loss`, `eval_loss` (means over tokens, in nats), `step` and `seconds` where they were measured; the
    held-out loss EVALUATIONS times, the beginning and the end included.

    folder: for checkpoints, a tenth of the run apart. resume: go on from the last of them, where there is one.
    arguments: of `TrainingArguments`; `max_steps` must be among them.

    Raises IA3Error if a number is no longer finite, and Stopped at Ctrl-C or SIGTERM, once the step's checkpoint is
    written.
    """
    steps = arguments["max_steps"]
    defaults = {
        "output_dir": str(folder),
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "eval_strategy": "steps" if corpus.held_out else "no",
        "eval_steps": math.ceil(steps / min(EVALUATIONS - 1, steps)),
        "save_strategy": "steps",
        "save_steps": math.ceil(steps / CHECKPOINTS),
        "save_total_limit": 2,  # a full disk may cut the last one short
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # else the Trainer would report a NaN as the loss before it
        "disable_tqdm": True,
    }
    use_cache = model.config.use_cache
    last, state = _last_checkpoint(folder) if resume else (None, None)
    try:
        training = TrainingArguments(**(defaults | arguments), eval_on_start=bool(corpus.held_out) and last is None)
        watch = Watch(report)
        trainer = _Trainer(
            model=model,
            args=training,
            train_dataset=corpus.train,
            eval_dataset=corpus.held_out or None,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            callbacks=[watch],
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # what it says of its own arguments
        raise IA3Error(f"transformers' Trainer refuses its options: {reason_of(error)}") from error
    trainer.remove_callback(PrinterCallback)
    try:
        if state and state.global_step >= steps:  # the Trainer would do one more
            model.load_adapter(last, "default")
            trainer.state = state
        else:
            with watch:
                trainer.train(resume_from_checkpoint=last)
    except OSError as error:
        raise IA3Error(f"a checkpoint could not be written to {folder}: {error}; the one before is whole.") from error
    finally:
        model.config.use_cache = use_cache  # the Trainer turned it off
        model.eval()
    return [entry | {"seconds": watch.seconds.get(entry["step"])} for entry in trainer.state.log_history]


def _last_checkpoint(folder: Path) -> tuple[str | None, TrainerState | None]:
    """Return the newest checkpoint that is whole, and its state, which the Trainer writes last."""
    names = re.compile(r"checkpoint-([0-9]{1,18})")
    found = {int(match[1]): path for path in folder.iterdir() if (match := names.fullmatch(path.name))}
    for _, path in sorted(found.items(), reverse=True):
        list(files_in(path))  # the Trainer reads whatever has the right name
        with contextlib.suppress(OSError, ValueError, TypeError):
            return str(path), TrainerState.load_from_json(str(path / "trainer_state.json"))
    return None, None


class _Trainer(Trainer):
    """transformers' Trainer, but its held-out loss is the mean over tokens; theirs is over batches of any lengths."""

    control: TrainerControl  # which their annotations lack

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
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": perplexity(loss)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def perplexity(loss: float) -> float:
    """Return the perplexity of a loss in nats; infinity beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


class Watch(TrainerCallback):
    """Reports steps, stops at what is not finite, and turns Ctrl-C and SIGTERM into a last checkpoint.

    As a context, it has the signals: the first lets the step finish, the second ends it at once.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self.seconds: dict[int, float] = {}
        self.signal = 0
        self.started = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._stop)
        except ValueError:  # not the main thread: signals are another's to handle
            pass

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise Stopped(number, "nothing of this step was kept.")
        self.signal = number
        say("Interrupted", "finishing the step; once more to stop at once.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds[state.global_step] = time.perf_counter() - self.started
        if self.signal:
            control.should_evaluate = False
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], model: Any, **_: Any) -> None:
        step = state.global_step
        for name, what in (("loss", "training loss"), ("eval_loss", "held-out loss"), ("grad_norm", "gradient's norm")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise IA3Error(_not_finite(what, logs[name], step))
        if "loss" in logs:
            # A checkpoint of this step would keep them: gradients that were finite may have led to what is not.
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            if not all(bool(parameter.isfinite().all()) for parameter in trained):
                raise IA3Error(_not_finite("trained values", math.nan, step))
            self.report(step, state.max_steps, logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signal:
            kept = "is kept; the same command with --resume goes on." if args.save_strategy != "no" else "was the last."
            raise Stopped(self.signal, f"step {state.global_step} {kept}")


def _not_finite(what: str, value: float, step: int) -> str:
    return f"the {what} became {value} at step {step}; try a smaller --learning-rate or --dtype float32."
