"""Training an adapter with transformers' Trainer, and the history that it leaves."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..errors import IA3Error
from .data import IGNORED, Corpus, Example, collate
from .options import TrainingOptions

if TYPE_CHECKING:
    from .. import IA3Model

Progress = Callable[[int, int, float], None]  # steps done, steps in all, the last step's loss


@dataclass
class History:
    """What happened. Losses are means over tokens, in nats, each with the number of steps done when it was measured."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


def mean_loss(model: nn.Module, examples: Sequence[Example], batch_size: int, pad_token_id: int) -> float:
    """The mean loss over all learned tokens of `examples`, in nats; the model's mode is put back."""
    device = next(model.parameters()).device
    training = model.training
    total, tokens = 0.0, 0
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(examples), batch_size):
                batch = collate(examples[start : start + batch_size], pad_token_id)
                # The label of a sequence's first token is never compared: nothing comes before it.
                learned = int((batch["labels"][:, 1:] != IGNORED).sum())
                loss = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss
                total += loss.item() * learned
                tokens += learned
    finally:
        model.train(training)
    return total / tokens


def train(
    model: IA3Model, corpus: Corpus, options: TrainingOptions, pad_token_id: int, progress: Progress | None = None
) -> History:
    """Trains the trainable parameters of `model`, on the device where it is, and returns the history.

    The held-out loss is measured before the first step, after the last, and in between `options.evaluations` times in
    all; without held-out data it is not. Raises IA3Error if a loss is no longer finite.
    """
    history = History()
    steps_a_pass = math.ceil(len(corpus.train) / (options.batch_size * options.accumulation))
    steps = options.steps or math.ceil(steps_a_pass * options.epochs)
    recorder = _Recorder(history, corpus, model, options, steps, pad_token_id, progress)
    use_cache = model.config.use_cache
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer insists on a folder, though it has nothing to write
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.schedule,
            weight_decay=0.0,  # decay pulls towards zero, and a vector of zeros silences its layer; ones are neutral
            seed=options.seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            logging_nan_inf_filter=False,  # else the Trainer would report a NaN as the loss before it
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=corpus.train,
            data_collator=partial(collate, pad_token_id=pad_token_id),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            model.config.use_cache = use_cache  # the Trainer turned it off
            model.eval()
    return history


class _Recorder(TrainerCallback):
    """Writes the history, measures the held-out loss and stops at a loss that is not finite."""

    def __init__(
        self,
        history: History,
        corpus: Corpus,
        model: IA3Model,
        options: TrainingOptions,
        steps: int,
        pad_token_id: int,
        progress: Progress | None,
    ) -> None:
        self.history = history
        self.corpus = corpus
        self.model = model
        self.options = options
        self.steps = steps
        self.pad_token_id = pad_token_id
        self.progress = progress
        intervals = min(max(options.evaluations - 1, 1), steps)
        self.due = {round(steps * index / intervals) for index in range(intervals + 1)}
        self.started = 0.0

    def _measure(self, step: int) -> None:
        if not self.corpus.held_out or step not in self.due:
            return
        loss = mean_loss(self.model, self.corpus.held_out, self.options.batch_size, self.pad_token_id)
        _check_finite(loss, "held-out", step)
        self.history.held_out.append((step, loss))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._measure(0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.history.step_seconds.append(time.perf_counter() - self.started)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # the Trainer also logs a summary of the whole run
            return
        loss = float(logs["loss"])
        _check_finite(loss, "training", state.global_step)
        self.history.train.append((state.global_step, loss))
        if self.progress is not None:
            self.progress(state.global_step, self.steps, loss)
        self._measure(state.global_step)


def _check_finite(loss: float, which: str, step: int) -> None:
    if not math.isfinite(loss):
        raise IA3Error(
            f"the {which} loss became {loss} at step {step}; try a smaller --learning-rate or --dtype float32."
        )
