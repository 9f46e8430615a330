"""Prompts to tokens, and tokens to their continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import IA3Error
from .data import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, and where to stop. Temperature 0 takes the likeliest; `top_k` 0 and `top_p` 1 keep all."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def arguments(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return keyword arguments for transformers' `generate`."""
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.stop:
            arguments |= {"stop_strings": list(self.stop), "tokenizer": tokenizer}
        return arguments


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]], is_chat: bool) -> list[int]:
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


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, **arguments: Any
) -> list[tuple[str, int]]:
    """Return what `model` puts after each of `prompts`, and how many tokens that is.

    The same seed gives the same texts, whatever came before. A stop string, and what follows it, is left out.
    arguments: for the model's `generate`, such as `streamer` and `adapter_names`.
    """
    import torch
    from transformers import set_seed

    pad, width = tokenizer.pad_token_id, max(map(len, prompts))
    # Filled up on the left: what is generated begins in the same column for all.
    ids = torch.tensor([[pad] * (width - len(tokens)) + list(tokens) for tokens in prompts])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts])
    ends = model.generation_config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    device = next(model.parameters()).device
    set_seed(sampling.seed)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pad_token_id=pad,
            eos_token_id=sorted(stops) or None,
            **sampling.arguments(tokenizer),
            **arguments,
        )
    results = []
    for row in output[:, width:].tolist():
        count = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
        text = str(tokenizer.decode(row[:count], skip_special_tokens=True))
        cuts = [place for place in map(text.find, sampling.stop) if place >= 0]
        results.append((text[: min(cuts)] if cuts else text, count))
    return results
