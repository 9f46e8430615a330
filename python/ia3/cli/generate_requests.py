"""`ia3 generate --requests`: many requests, each with an adapter of its own, in mixed batches."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import IA3Error
from ..files import atomic_write_text
from . import checkpoints, requests
from .boundary import USER_ERROR
from .options import Sampling
from .requests import BASE_NAME, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .. import IA3Model

# Adapters that have a slot at a time; more wait in host memory.
_SLOTS = 1024


@dataclass(frozen=True)
class Job:
    """One call of `ia3 generate` with `--requests`. `output` None is stdout."""

    model: Path
    adapters: Path
    requests: Path
    output: Path | None
    batch_size: int
    sampling: Sampling
    dtype: str
    device: str


def run(job: Job) -> int:
    """Writes a line of JSON for each request, in their order: its text, or its error.

    Returns the exit code: 0, or that of a user's error if a request failed.
    """
    source = checkpoints.locate(job.model)
    folders = _folders(job.adapters)
    lines = requests.read(job.requests)
    stderr = Console(stderr=True)
    with stderr.status("importing torch and transformers"):
        import torch

    device = checkpoints.pick_device(job.device)
    with stderr.status(escape(f"loading {source.path}")):
        tokenizer = checkpoints.load_tokenizer(source)
        base = checkpoints.load_model(source, getattr(torch, job.dtype), device)
        checkpoints.check_vocabulary(base, tokenizer)
    results: dict[int, dict[str, Any]] = {}
    wanted: dict[int, tuple[Request, list[int]]] = {}
    for number, line in enumerate(lines):
        try:
            request = requests.parse(line, folders, job.sampling.max_new_tokens)
            tokens = list(tokenizer(request.prompt)["input_ids"])
            if not tokens:
                raise IA3Error("its prompt has no tokens.")
            checkpoints.check_length(base, len(tokens) + request.max_new_tokens, "its prompt with max_new_tokens")
        except IA3Error as error:
            results[number] = {"error": str(error)}
        else:
            wanted[number] = (request, tokens)

    names = {request.adapter for request, _ in wanted.values()} - {BASE_NAME}
    with stderr.status("loading adapters"):
        model, failed = _with_bank(base, {name: folders[name] for name in sorted(names)}, job.batch_size)
    for number, (request, _) in list(wanted.items()):
        if request.adapter in failed:
            del wanted[number]
            results[number] = {"error": failed[request.adapter]}
    results |= _answers(model, tokenizer, wanted, job, stderr)

    text = "".join(json.dumps({"request": n, **results[n]}, ensure_ascii=False) + "\n" for n in range(len(lines)))
    if job.output is None:
        sys.stdout.write(text)
    else:
        atomic_write_text(job.output, text)
    errors = sum("error" in result for result in results.values())
    if errors:
        stderr.print(f"{errors} of {len(lines)} requests failed; their lines say why.", style="bold yellow")
    return USER_ERROR if errors else 0


def _folders(path: Path) -> dict[str, Path]:
    """The adapters in a folder: its sub-folders that hold one, by name. Raises IA3Error where there are none."""
    if not path.is_dir():
        raise IA3Error(f"{path} is no folder; --adapters is a folder with a sub-folder for each adapter.")
    found = {child.name: child for child in sorted(path.iterdir()) if (child / "adapter_config.json").is_file()}
    if not found:
        raise IA3Error(f"no sub-folder of {path} holds an adapter; --adapters is a folder with one for each adapter.")
    return found


def _with_bank(
    base: PreTrainedModel, folders: Mapping[str, Path], batch_size: int
) -> tuple[PreTrainedModel | IA3Model, dict[str, str]]:
    """The model with these adapters in a bank, and for those that cannot be loaded, why not."""
    from .. import AdapterBank, IA3Config, IA3Model

    failed: dict[str, str] = {}
    model: IA3Model | None = None
    fitting: dict[str, Path] = {}
    targets: list[tuple[Any, ...]] = []
    for name, folder in folders.items():
        try:
            config = IA3Config.from_pretrained(folder)
            kind = (config.target_modules, config.feedforward_modules, config.exclude_modules)
            if config.modules_to_save:
                raise IA3Error(
                    f"the adapter {folder} trains whole modules, which the rows of a batch cannot differ in."
                )
            # The first of each kind stands in the model itself, so that its layers can be scaled.
            if kind not in targets:
                if model is None:
                    model = IA3Model.from_pretrained(base, folder, f"layers{len(targets)}")
                else:
                    model.load_adapter(folder, f"layers{len(targets)}")
                targets.append(kind)
        except IA3Error as error:
            failed[name] = str(error)
        else:
            fitting[name] = folder
    if model is None:
        return base, failed
    checkpoints.check_kernels(base.device.type, base.dtype)
    bank = AdapterBank(model, max(batch_size, min(len(fitting), _SLOTS)))
    for name, folder in fitting.items():
        try:
            bank.load(name, folder)
        except IA3Error as error:
            failed[name] = str(error)
    return model, failed


def _answers(
    model: PreTrainedModel | IA3Model,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Mapping[int, tuple[Request, list[int]]],
    job: Job,
    stderr: Console,
) -> dict[int, dict[str, Any]]:
    """The text of each request, by its number; shows how far it is, and how fast it was."""
    answers: dict[int, dict[str, Any]] = {}
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    written, start = 0, time.perf_counter()
    with Progress(*columns, console=stderr) as progress:
        task = progress.add_task("", total=len(wanted))
        for numbers in _batches(wanted, job):
            texts, tokens = _generate(model, tokenizer, [wanted[number] for number in numbers], job.sampling)
            written += tokens
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = {"adapter": wanted[number][0].adapter, "text": text}
            progress.update(task, advance=len(numbers))
    if wanted:
        seconds = time.perf_counter() - start
        stderr.print(f"{written:,} tokens in {seconds:.1f} s, {written / seconds:,.0f} a second")
    return answers


def _batches(wanted: Mapping[int, tuple[Request, list[int]]], job: Job) -> Iterator[list[int]]:
    """Requests that run together: as many new tokens for each, and prompts of about one length.

    Of exactly one length where repetition is held back, which would else count what fills up the shorter ones.
    """
    is_exact = job.sampling.repetition_penalty != 1

    def group(number: int) -> tuple[int, int]:
        request, tokens = wanted[number]
        return request.max_new_tokens, len(tokens) if is_exact else 0

    order = sorted(wanted, key=lambda number: (*group(number), len(wanted[number][1])))
    for _, members in groupby(order, group):
        numbers = list(members)
        yield from (numbers[i : i + job.batch_size] for i in range(0, len(numbers), job.batch_size))


def _generate(
    model: PreTrainedModel | IA3Model,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[Request, list[int]]],
    sampling: Sampling,
) -> tuple[list[str], int]:
    """The texts that follow the prompts of one batch, and how many tokens that is."""
    import torch
    from transformers import set_seed

    from .. import IA3Model

    pad, width = checkpoints.pad_token(tokenizer), max(len(tokens) for _, tokens in batch)
    # Filled up on the left: what is generated begins in the same column for all.
    ids = torch.tensor([[pad] * (width - len(tokens)) + tokens for _, tokens in batch])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for _, tokens in batch])
    arguments = replace(sampling, max_new_tokens=batch[0][0].max_new_tokens).arguments()
    if isinstance(model, IA3Model):
        arguments["adapter_names"] = [request.adapter for request, _ in batch]
    device = next(model.parameters()).device
    set_seed(sampling.seed)
    with torch.inference_mode():
        output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=pad, **arguments)
    new = output[:, width:].tolist()
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    count = sum(next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in new)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in new], count
