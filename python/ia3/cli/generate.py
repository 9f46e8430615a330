"""`ia3 generate`: continuations of prompts, written as they come."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from ..errors import IA3Error
from . import checkpoints
from .options import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation import BaseStreamer

    from .. import IA3Model


@dataclass(frozen=True)
class Job:
    """One call of `ia3 generate`."""

    model: Path
    adapter: Path | None
    prompts: Sequence[str]
    sampling: Sampling
    echo: bool
    dtype: str
    device: str


def run(job: Job) -> None:
    """Writes each prompt (unless `job.echo` is off) and its continuation to stdout, a line between two prompts."""
    source = checkpoints.locate(job.model)
    prompts = _prompts(job.prompts)
    stderr = Console(stderr=True)
    with stderr.status("importing torch and transformers"):
        import torch
        from transformers import TextStreamer

    device = checkpoints.pick_device(job.device)
    with stderr.status(escape(f"loading {source.path}")):
        tokenizer = checkpoints.load_tokenizer(source)
        base = checkpoints.load_model(source, getattr(torch, job.dtype), device)
        checkpoints.check_vocabulary(base, tokenizer)
        model = base if job.adapter is None else checkpoints.load_adapter(base, job.adapter)
    for number, prompt in enumerate(prompts):
        if number:
            print(flush=True)
        streamer = TextStreamer(tokenizer, skip_prompt=not job.echo, skip_special_tokens=True)
        continuation(model, tokenizer, prompt, job.sampling, streamer)


def continuation(
    model: PreTrainedModel | IA3Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
) -> str:
    """The text that `model` puts after `prompt`. The same seed gives the same text, whatever came before it.

    Raises IA3Error if the prompt is empty or, with the new tokens, longer than the model takes.
    """
    import torch
    from transformers import set_seed

    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if not length:
        raise IA3Error("the prompt is empty; give it at least one token.")
    checkpoints.check_length(model, length + sampling.max_new_tokens, "the prompt with --max-new-tokens")
    set_seed(sampling.seed)
    device = next(model.parameters()).device
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            streamer=streamer,
            pad_token_id=checkpoints.pad_token(tokenizer),
            **sampling.arguments(),
        )
    return str(tokenizer.decode(output[0, length:], skip_special_tokens=True))


def _prompts(given: Sequence[str]) -> list[str]:
    if given:
        return list(given)
    if sys.stdin.isatty():
        raise IA3Error("there is no prompt; give --prompt TEXT (as often as you like) or pipe one in.")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise IA3Error("what was piped in as the prompt is not text in the terminal's encoding; give UTF-8.") from error
    if not text.strip():
        raise IA3Error("what was piped in as the prompt is empty; give --prompt TEXT or pipe text.")
    return [text.rstrip("\n")]
