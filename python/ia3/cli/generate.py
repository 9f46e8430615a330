"""`ia3 generate`: continuations of prompts, written as they come; or answers to many requests, in mixed batches."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer import Option

from ..errors import IA3Error
from . import checkpoints, options, output, requests
from .boundary import USER_ERROR
from .finetune import METRICS
from .generation import encode, generate
from .requests import BASE_NAME, Request

# Adapters that have a slot at a time; more wait in host memory.
_SLOTS = 1024
_Wanted = dict[int, tuple[Request, list[int]]]  # by their lines: requests that can run, and the tokens of their prompts


@dataclass(frozen=True)
class Generate:
    """Write continuations of prompts, with an adapter or without; or answer many requests, each with its own."""

    model: options.Model
    adapter: Annotated[
        Path | None, Option(metavar="DIR", help="Folder with an adapter. Without one, the base model speaks.")
    ] = None
    prompt: Annotated[
        list[str] | None,
        Option(metavar="TEXT", help="Text to go on from; may be given several times. Default: what is piped in."),
    ] = None
    requests: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="JSON Lines (- for stdin): a 'prompt' or chat 'messages' in each, and if wanted its 'id', 'adapter', "
            "'max_new_tokens' and 'stop'.",
        ),
    ] = None
    adapters: Annotated[
        Path | None, Option(metavar="DIR", help="Folder with a sub-folder for each adapter that --requests may name.")
    ] = None
    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="FILE", help="Where answers to --requests go, as they come. Default: stdout."),
    ] = None
    batch_size: Annotated[int, Option(min=1, help="Requests that run together.")] = 32
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens to write, at most.")] = 64
    stop: Annotated[
        list[str] | None, Option(metavar="TEXT", help="Text to stop before; may be given several times.")
    ] = None
    temperature: Annotated[
        float, Option(callback=options.not_negative, help="0 takes the likeliest token, more is more random.")
    ] = 0.0
    top_p: Annotated[
        float,
        Option(callback=options.between(0, 1, open_low=True), help="Sample from the likeliest tokens of this mass."),
    ] = 1.0
    top_k: Annotated[int, Option(min=0, help="Sample from that many of the likeliest tokens; 0 for all.")] = 0
    repetition_penalty: Annotated[
        float, Option(callback=options.positive, help="Above 1 holds back tokens that were there already.")
    ] = 1.0
    chat: Annotated[
        bool | None,
        Option(
            "--chat/--no-chat",
            help="Prompt through the model's chat template. Default: if it has one, and the adapter was not trained on "
            "plain text.",
        ),
    ] = None
    echo: Annotated[
        bool | None, Option("--echo/--no-echo", help="Write the prompt first. Default: unless it is a chat's.")
    ] = None
    load_in_4bit: options.FourBit = False
    dtype: options.Dtype = "bfloat16"
    device: options.Device = "auto"
    seed: options.Seed = 0

    def run(self) -> int:
        """Return the exit code: 0, or that of a user's error if a request failed."""
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise IA3Error(
                "--top-p and --top-k choose what to sample from, but --temperature is 0: it does not sample."
            )
        if self.requests is None and (self.adapters or self.output):
            raise IA3Error("--adapters and --output are for --requests; use --adapter, and redirect stdout.")
        if self.requests is not None and (self.prompt or (self.adapter and self.adapters)):
            raise IA3Error("--requests names its own prompts; leave --prompt out, and one of --adapter and --adapters.")
        if self.output is not None:
            output.check_file(self.output)
        source = checkpoints.locate(self.model)
        checkpoints.require(
            "ia3 generate",
            *(["accelerate", "gguf"] if source.gguf_file else []),
            *(["bitsandbytes", "accelerate"] if self.load_in_4bit else []),
        )
        folders = _folders(self.adapters) if self.adapters else {}
        lines = requests.read(self.requests) if self.requests else []
        prompts = [] if self.requests else self.prompt or _piped()
        stderr = Console(stderr=True)
        with stderr.status("importing torch and transformers"):
            import torch  # noqa: F401  (what follows needs it; the status says why nothing happens)

        device = checkpoints.pick_device(self.device)
        with stderr.status(escape(f"loading {source.path}")):
            dtype = checkpoints.pick_dtype(self.dtype, device)
            tokenizer, model = checkpoints.load(source, dtype, device, self.load_in_4bit)
            if self.adapter is not None:
                model = checkpoints.load_adapter(model, self.adapter)
        if self.requests:
            return self._answer(lines, folders, model, tokenizer, stderr)
        self._continue(prompts, model, tokenizer)
        return 0

    @property
    def sampling(self) -> dict[str, Any]:
        """Return how to choose tokens, for transformers' `generate`."""
        chosen: dict[str, Any] = {"repetition_penalty": self.repetition_penalty, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"seed": self.seed} | chosen

    def _is_chat(self, tokenizer: Any, adapter: Path | None) -> bool:
        """Return whether to prompt through the template: as was asked for, or as the adapter was trained."""
        if self.chat is not None:
            return self.chat
        return bool(tokenizer.chat_template) and not (adapter and _is_of_plain_text(adapter))

    def _continue(self, prompts: list[str], model: Any, tokenizer: Any) -> None:
        """Write each prompt (unless echo is off) and its continuation to stdout, a line between two prompts."""
        from transformers import TextStreamer

        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # what the terminal cannot show
        is_chat = self._is_chat(tokenizer, self.adapter)
        echo = not is_chat if self.echo is None else self.echo
        encoded = [encode(tokenizer, prompt, is_chat) for prompt in prompts]
        longest = max(map(len, encoded)) + self.max_new_tokens
        checkpoints.check_length(model, longest, "the prompt with --max-new-tokens")
        for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
            print("\n" * (number > 0) + prompt * echo + "\n" * (echo and is_chat), end="", flush=True)
            # What a stop string cuts off is known at the end only.
            streamer = None if self.stop else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop": self.stop or ()}
            options |= {"streamer": streamer} | self.sampling
            [(text, _)] = generate(model, tokenizer, [tokens], **options)
            if streamer is None:
                print(text)

    def _answer(
        self, lines: list[tuple[int, bytes]], folders: Mapping[str, Path], model: Any, tokenizer: Any, stderr: Console
    ) -> int:
        """Write a line of JSON for each request as soon as it is known: its text, or its error."""
        wanted: _Wanted = {}
        ids: dict[int, Any] = {}
        errors = 0
        with output.json_lines(self.output) as write:

            def answer(line: int, **content: Any) -> None:
                nonlocal errors
                errors += "error" in content
                write({"line": line} | ({"id": ids[line]} if line in ids else {}) | content)

            for line, raw in lines:
                try:
                    content = requests.decode(raw)
                    if "id" in content:
                        ids[line] = content["id"]
                    request = requests.parse(content, folders, self.max_new_tokens, self.stop or ())
                    folder = folders[request.adapter] if request.adapter else self.adapter
                    tokens = encode(tokenizer, request.prompt, self._is_chat(tokenizer, folder))
                    length = len(tokens) + request.max_new_tokens
                    checkpoints.check_length(model, length, "its prompt with max_new_tokens")
                except IA3Error as error:
                    answer(line, error=str(error))
                else:
                    wanted[line] = (request, tokens)
            names = sorted({request.adapter for request, _ in wanted.values() if request.adapter})
            with stderr.status("loading adapters"):
                model, known, failed = _with_bank(model, {name: folders[name] for name in names}, self.batch_size)
            for line, (request, _) in list(wanted.items()):
                if request.adapter in failed:
                    del wanted[line]
                    answer(line, error=failed[request.adapter])
            columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            written, start = 0, time.perf_counter()
            with Progress(*columns, console=stderr) as progress:
                task = progress.add_task("", total=len(wanted))
                for batch in _batches(wanted, self):
                    for line, result in _run(model, tokenizer, wanted, batch, known, self.sampling):
                        if isinstance(result, str):
                            answer(line, error=result)
                        else:
                            answer(line, adapter=wanted[line][0].adapter or BASE_NAME, text=result[0])
                            written += result[1]
                        progress.advance(task)
        if wanted:
            seconds = time.perf_counter() - start
            stderr.print(f"{written:,} tokens in {seconds:.1f} s, {written / seconds:,.0f} a second")
        if errors:
            stderr.print(f"{errors} of {len(lines)} requests failed; their lines say why.", style="bold yellow")
        return USER_ERROR if errors else 0


@functools.cache
def _is_of_plain_text(adapter: Path) -> bool:
    """Return whether `ia3 finetune` says that it trained this adapter on texts or pairs as they are."""
    try:
        return bool(json.loads((adapter / METRICS).read_text("utf-8"))["format"] != "messages")
    except (OSError, ValueError, KeyError, TypeError):  # not written by `ia3 finetune`
        return False


def _piped() -> list[str]:
    if sys.stdin.isatty():
        raise IA3Error("there is no prompt; give --prompt TEXT (as often as you like) or pipe one in.")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise IA3Error("what was piped in as the prompt is not text in the terminal's encoding; give UTF-8.") from error
    if not text.strip():
        raise IA3Error("what was piped in as the prompt is empty; give --prompt TEXT or pipe text.")
    return [text.rstrip("\n")]


def _folders(path: Path) -> dict[str, Path]:
    """Return the sub-folders that hold an adapter, by name. Raises IA3Error where there are none."""
    if not path.is_dir():
        raise IA3Error(f"{path} is no folder; --adapters is a folder with a sub-folder for each adapter.")
    found = {child.name: child for child in sorted(path.iterdir()) if (child / "adapter_config.json").is_file()}
    if not found:
        raise IA3Error(f"no sub-folder of {path} holds an adapter; --adapters is a folder with one for each adapter.")
    return found


def _with_bank(base: Any, folders: Mapping[str, Path], batch_size: int) -> tuple[Any, dict[str, str], dict[str, str]]:
    """Return the model with these adapters in a bank, their names in it, and for those that do not load, why not."""
    from .. import AdapterBank, IA3Config, PeftModel

    failed: dict[str, str] = {}
    model: Any = None
    fitting: list[str] = []
    targets: list[tuple[Any, ...]] = []
    for name, folder in folders.items():
        try:
            config = IA3Config.from_pretrained(folder)
            kind = (config.target_modules, config.feedforward_modules, config.exclude_modules)
            if config.modules_to_save:
                raise IA3Error(f"the adapter {folder} trains whole modules, which rows of a batch cannot differ in.")
            # The first of each kind stands in the model itself, so that its layers can be scaled.
            if kind not in targets:
                if model is None:
                    model = PeftModel.from_pretrained(base, folder, f"layers{len(targets)}")
                else:
                    model.load_adapter(folder, f"layers{len(targets)}")
                targets.append(kind)
            checkpoints.warn_if_merged(base, folder)
            fitting.append(name)
        except (IA3Error, OSError) as error:
            failed[name] = str(error)
    if model is None:
        return base, {}, failed
    checkpoints.check_kernels(base.device.type, base.dtype)
    bank = AdapterBank(model, max(batch_size, min(len(fitting), _SLOTS)))
    known: dict[str, str] = {}
    for number, name in enumerate(fitting):
        try:
            bank.load(f"adapter{number}", folders[name])  # a folder may have any name, and a name in a model not
            known[name] = f"adapter{number}"
        except IA3Error as error:
            failed[name] = str(error)
    return model, known, failed


def _batches(wanted: _Wanted, job: Generate) -> Iterator[list[int]]:
    """Yield lines that run together: as many new tokens and the same stops for each, prompts of about one length.

    Of exactly one length where repetition is held back, which would else count what fills up the shorter ones.
    """
    is_exact = job.repetition_penalty != 1

    def group(line: int) -> tuple[Any, ...]:
        request, tokens = wanted[line]
        return request.max_new_tokens, request.stop, len(tokens) if is_exact else 0

    order = sorted(wanted, key=lambda line: (*group(line), len(wanted[line][1])))
    for _, members in groupby(order, group):
        batch = list(members)
        yield from (batch[start : start + job.batch_size] for start in range(0, len(batch), job.batch_size))


def _run(
    model: Any, tokenizer: Any, wanted: _Wanted, batch: list[int], known: Mapping[str, str], sampling: dict[str, Any]
) -> Iterable[tuple[int, tuple[str, int] | str]]:
    """Return each line's text and count of tokens, or its error: a batch that fails runs again, one by one."""
    first, prompts = wanted[batch[0]][0], [wanted[line][1] for line in batch]
    named = {"adapter_names": [known.get(wanted[line][0].adapter or "", BASE_NAME) for line in batch]} if known else {}
    options: dict[str, Any] = {"max_new_tokens": first.max_new_tokens, "stop": first.stop, **sampling, **named}
    try:
        return list(zip(batch, generate(model, tokenizer, prompts, **options), strict=True))
    except Exception as error:  # of whatever kind: the other requests are not to blame
        if len(batch) == 1:
            return [(batch[0], f"{type(error).__name__}: {str(error)[:200]}")]
    return [each for line in batch for each in _run(model, tokenizer, wanted, [line], known, sampling)]
