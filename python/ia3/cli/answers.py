"""What `ia3 generate` does with a loaded model: it goes on from prompts, or answers requests in mixed batches."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import IA3Error, reason_of
from ..files import read_json
from . import checkpoints, output, requests
from .boundary import USER_ERROR
from .data import render_chat
from .finetune import METRICS
from .requests import BASE_NAME, Request

# Adapters that have a slot at a time; more wait in host memory.
_SLOTS = 1024


class _Ready(NamedTuple):
    """A request that can run, behind what its answer begins with, and the tokens of its prompt."""

    head: dict[str, Any]
    request: Request
    tokens: list[int]


def go_on(job: Any, prompts: list[str], model: Any, tokenizer: Any) -> None:
    """Write each prompt (unless echo is off) and its continuation to stdout, a line between two prompts."""
    from transformers import TextStreamer

    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # what the terminal cannot show
    is_chat = _is_chat(job, tokenizer, job.adapter)
    echo = not is_chat if job.echo is None else job.echo
    encoded = [encode(tokenizer, prompt, is_chat) for prompt in prompts]
    longest = max(map(len, encoded)) + job.max_new_tokens
    checkpoints.check_length(model, longest, "the prompt with --max-new-tokens")
    for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
        print("\n" * (number > 0) + prompt * echo + "\n" * (echo and is_chat), end="", flush=True)
        # What a stop string cuts off is known at the end only.
        streamer = None if job.stop else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"max_new_tokens": job.max_new_tokens, "streamer": streamer, **job.sampling}
        [(text, _)] = generate(model, tokenizer, [tokens], job.stop or (), **options)
        if streamer is None:
            print(text)


def answer_all(
    job: Any, lines: list[tuple[int, bytes]], folders: Mapping[str, Path], model: Any, tokenizer: Any
) -> int:
    """Write a line of JSON for each request as soon as it is known: its text, or its error. Return the exit code."""
    stderr = Console(stderr=True)
    ready: list[_Ready] = []
    errors = written = 0
    with output.json_lines(job.output) as write:

        def answer(head: dict[str, Any], **content: Any) -> None:
            nonlocal errors
            errors += "error" in content
            write(head | content)

        for line, raw in lines:
            head: dict[str, Any] = {"line": line}
            try:
                content = requests.decode(raw)
                head |= {"id": content["id"]} if "id" in content else {}
                request = requests.parse(content, folders, job.max_new_tokens, job.stop or ())
                folder = folders[request.adapter] if request.adapter else job.adapter
                tokens = encode(tokenizer, request.prompt, _is_chat(job, tokenizer, folder))
                length = len(tokens) + request.max_new_tokens
                checkpoints.check_length(model, length, "its prompt with max_new_tokens")
                ready.append(_Ready(head, request, tokens))
            except Exception as error:  # a tokenizer's, say, of what is no text
                answer(head, error=_said(error))
        names = sorted({one.request.adapter for one in ready if one.request.adapter})
        with stderr.status("loading adapters"):
            model, known, failed = _with_bank(model, {name: folders[name] for name in names}, job.batch_size)
        for one in ready:
            if one.request.adapter in failed:
                answer(one.head, error=failed[one.request.adapter])
        ready = [one for one in ready if one.request.adapter not in failed]
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        start = time.perf_counter()
        with Progress(*columns, console=stderr) as progress:
            task = progress.add_task("", total=len(ready))
            for batch in _batches(ready, job):
                for one, result in _run(model, tokenizer, batch, known, job.sampling):
                    if isinstance(result, str):
                        answer(one.head, error=result)
                    else:
                        answer(one.head, adapter=one.request.adapter or BASE_NAME, text=result[0])
                        written += result[1]
                    progress.advance(task)
    if ready:
        seconds = time.perf_counter() - start
        stderr.print(f"{written:,} tokens in {seconds:.1f} s, {written / seconds:,.0f} a second")
    if errors:
        stderr.print(f"{errors} of {len(lines)} requests failed; their lines say why.", style="bold yellow")
    return USER_ERROR if errors else 0


# --- prompts ---------------------------------------------------------------------------------------------------------


def _is_chat(job: Any, tokenizer: Any, adapter: Path | None) -> bool:
    """Return whether to prompt through the template: as was asked for, or as the adapter was trained."""
    if job.chat is not None:
        return bool(job.chat)
    return bool(tokenizer.chat_template) and not (adapter and _is_of_plain_text(adapter))


@functools.cache
def _is_of_plain_text(adapter: Path) -> bool:
    """Return whether `ia3 finetune` says that it trained this adapter on texts or pairs as they are."""
    try:
        return bool(read_json(adapter / METRICS)["format"] != "messages")
    except (IA3Error, KeyError):  # not written by `ia3 finetune`
        return False


def encode(tokenizer: Any, prompt: str | list[dict[str, Any]], is_chat: bool) -> list[int]:
    """Return the tokens of a prompt: of a text as it is or as a chat's first turn, or of a chat's turns.

    Raises IA3Error if there are none.
    """
    if isinstance(prompt, str) and not is_chat:
        tokens = tokenizer(prompt, verbose=False)["input_ids"]
    else:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = render_chat(tokenizer, turns, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokens or not prompt:
        raise IA3Error("the prompt is empty; give it at least one token.")
    return list(tokens)


# --- batches ---------------------------------------------------------------------------------------------------------


def _with_bank(base: Any, folders: Mapping[str, Path], batch_size: int) -> tuple[Any, dict[str, str], dict[str, str]]:
    """Return the model with these adapters in a bank, their names in it, and for those that do not load, why not."""
    from .. import AdapterBank, IA3Config

    bank: Any = None
    known: dict[str, str] = {}
    failed: dict[str, str] = {}
    covered = set()  # what the model has layers for
    for number, (name, folder) in enumerate(folders.items()):
        try:
            config = IA3Config.from_pretrained(folder)
            if config.modules_to_save:
                raise IA3Error(f"the adapter {folder} trains whole modules, which rows of a batch cannot differ in.")
            checkpoints.warn_if_merged(base, folder)
            fields = (config.target_modules, config.feedforward_modules, config.exclude_modules)
            kind = repr([sorted(field) if isinstance(field, set) else field for field in fields])
            config.init_ia3_weights = True
            if bank is None:
                bank = AdapterBank(base, config, max(batch_size, min(len(folders), _SLOTS)))
            elif kind not in covered:
                bank.model.add_adapter(f"layers{number}", config)
            covered.add(kind)
            bank.load(f"adapter{number}", folder)  # a folder may have any name, and a name in a model not
            known[name] = f"adapter{number}"
        except (IA3Error, OSError) as error:  # a broken file's, or of an adapter that scales what this model has not
            failed[name] = str(error)
    return base if bank is None else bank.model.eval(), known, failed


def _batches(ready: list[_Ready], job: Any) -> Iterator[list[_Ready]]:
    """Yield requests that run together: as many new tokens and the same stops for each, prompts of about one length.

    Of exactly one length where repetition is held back, which would else count what fills up the shorter ones.
    """
    is_exact = job.repetition_penalty != 1

    def group(one: _Ready) -> tuple[Any, ...]:
        return one.request.max_new_tokens, one.request.stop, len(one.tokens) if is_exact else 0

    for _, members in groupby(sorted(ready, key=lambda one: (*group(one), len(one.tokens))), group):
        batch = list(members)
        yield from (batch[start : start + job.batch_size] for start in range(0, len(batch), job.batch_size))


def _run(
    model: Any, tokenizer: Any, batch: list[_Ready], known: Mapping[str, str], sampling: dict[str, Any]
) -> list[tuple[_Ready, tuple[str, int] | str]]:
    """Return each request's text and count of tokens, or its error: a batch that fails runs again, one by one."""
    options = {"max_new_tokens": batch[0].request.max_new_tokens, **sampling}
    if known:
        options["adapter_names"] = [known.get(one.request.adapter or "", BASE_NAME) for one in batch]
    try:
        prompts = [one.tokens for one in batch]
        results = generate(model, tokenizer, prompts, batch[0].request.stop, **options)
        return list(zip(batch, results, strict=True))
    except Exception as error:  # of whatever kind: the other requests are not to blame
        if len(batch) == 1:
            return [(batch[0], _said(error))]
    return [each for one in batch for each in _run(model, tokenizer, [one], known, sampling)]


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, IA3Error) else f"{type(error).__name__}: {reason_of(error)}"


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> list[tuple[str, int]]:
    """Return what `model` puts after each of `prompts`, and how many tokens that is.

    The same seed gives the same texts, whatever came before. A stop string, and what follows it, is left out.
    options: for the model's `generate`, such as `max_new_tokens`, `streamer` and `adapter_names`.
    """
    import torch
    from transformers import set_seed

    width = max(map(len, prompts))
    # Filled up on the left: what is generated begins in the same column for all.
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_attention_mask=True, return_tensors="pt")
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if stop:
        options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    set_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            **inputs.to(next(model.parameters()).device),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends) or None,
            **options,
        )
    results = []
    for row in output[:, width:].tolist():
        count = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        text = str(tokenizer.decode(row[:count], skip_special_tokens=True))
        cuts = [place for place in map(text.find, stop) if place >= 0]
        results.append((text[: min(cuts)] if cuts else text, count))
    return results
