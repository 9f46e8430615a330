"""`ia3 generate`: continuations of prompts, written as they come; or answers to many requests, in mixed batches."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from typer import Option

from ..errors import IA3Error
from ..files import LONGEST_TEXT, check_file
from . import options
from .options import at_least, within


@dataclass(frozen=True)
class Generate:
    """Write continuations of prompts, with an adapter or without; or answer many requests, each with its own."""

    model: options.Model
    adapter: Path | None = Option(None, metavar="DIR", help="An adapter's folder. Without one, the base model speaks.")
    prompt: list[str] | None = Option(
        None, metavar="TEXT", help="Text to go on from; may be given several times. Default: what is piped in."
    )
    requests: Path | None = Option(
        None,
        metavar="FILE",
        help="JSON Lines (- for stdin): a 'prompt' or chat 'messages' in each, and if wanted its 'id', 'adapter', "
        "'max_new_tokens' and 'stop'.",
    )
    adapters: Path | None = Option(None, metavar="DIR", help="Folder with a sub-folder for each adapter of --requests.")
    output: Path | None = Option(
        None, "--output", "-o", metavar="FILE", help="Where answers to --requests go, as they come. Default: stdout."
    )
    batch_size: int = Option(32, callback=at_least(1), help="Requests that run together.")
    max_new_tokens: int = Option(64, callback=at_least(1), help="Tokens to write, at most.")
    stop: list[str] | None = Option(None, metavar="TEXT", help="Text to stop before; may be given several times.")
    temperature: float = Option(
        0.0, callback=within("[0, inf)"), help="0 takes the likeliest token, more is more random."
    )
    top_p: float = Option(1.0, callback=within("(0, 1]"), help="Sample from the likeliest tokens of this mass.")
    top_k: int = Option(0, callback=at_least(0), help="Sample from that many of the likeliest tokens; 0 for all.")
    repetition_penalty: float = Option(
        1.0, callback=within("(0, inf)"), help="Above 1 holds back what was there already."
    )
    chat: bool | None = Option(
        None,
        "--chat/--no-chat",
        help="Prompt through the model's chat template. Default: if it has one, and the adapter was not trained on "
        "plain text.",
    )
    echo: bool | None = Option(None, "--echo/--no-echo", help="Write the prompt first. Default: unless it is a chat's.")
    load_in_4bit: options.FourBit = False
    dtype: options.Dtype = "bfloat16"
    device: options.Device = "auto"
    seed: options.Seed = 0

    def run(self) -> int:
        """Return the exit code: 0, or that of a user's error if a request failed."""
        from . import answers, checkpoints, requests

        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise IA3Error("--top-p and --top-k are for sampling, but --temperature is 0: it does not sample.")
        if self.requests is None and (self.adapters or self.output):
            raise IA3Error("--adapters and --output are for --requests; use --adapter, and redirect stdout.")
        if self.requests is not None and (self.prompt or (self.adapter and self.adapters)):
            raise IA3Error("--requests names its own prompts; leave --prompt out, and one of --adapter and --adapters.")
        if self.output is not None:
            check_file(self.output)
        source = checkpoints.locate(self.model)
        is_packed = bool(source.gguf_file)
        checkpoints.require(
            "ia3 generate", accelerate=is_packed or self.load_in_4bit, gguf=is_packed, bitsandbytes=self.load_in_4bit
        )
        folders = _folders(self.adapters) if self.adapters else {}
        lines = requests.read(self.requests) if self.requests else []
        prompts = [] if self.requests else self.prompt or _piped()
        stderr = Console(stderr=True)
        with stderr.status("importing torch and transformers"):
            import torch  # noqa: F401  (what follows needs it; the status says why nothing happens)

        tokenizer, model = checkpoints.load_for(self, source, stderr)
        if self.adapter is not None:
            model = checkpoints.load_adapter(model, self.adapter)
        if self.requests:
            return answers.answer_all(self, lines, folders, model, tokenizer)
        answers.go_on(self, prompts, model, tokenizer)
        return 0

    @property
    def sampling(self) -> dict[str, Any]:
        """Return how to choose tokens, for transformers' `generate`."""
        chosen: dict[str, Any] = {"repetition_penalty": self.repetition_penalty, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"seed": self.seed} | chosen


def _piped() -> list[str]:
    if sys.stdin.isatty():
        raise IA3Error("there is no prompt; give --prompt TEXT (as often as you like) or pipe one in.")
    try:
        text = sys.stdin.read(LONGEST_TEXT + 1)
    except UnicodeDecodeError as error:
        raise IA3Error("what was piped in as the prompt is not text in the terminal's encoding; give UTF-8.") from error
    if len(text) > LONGEST_TEXT:
        raise IA3Error(f"what was piped in as the prompt is longer than {LONGEST_TEXT:,} characters; give less.")
    if not text.strip():
        raise IA3Error("what was piped in as the prompt is empty; give --prompt TEXT or pipe text.")
    return [text.rstrip("\n")]


def _folders(path: Path) -> dict[str, Path]:
    """Return the sub-folders that hold an adapter, by name. Raises IA3Error where there are none."""
    if not os.path.isdir(path):
        raise IA3Error(f"{path} is no folder; --adapters is a folder with a sub-folder for each adapter.")
    found = {child.name: child for child in sorted(path.iterdir()) if (child / "adapter_config.json").is_file()}
    if not found:
        raise IA3Error(f"no sub-folder of {path} holds an adapter; --adapters is a folder with one for each adapter.")
    return found
