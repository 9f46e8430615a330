"""Prompts to tokens, and tokens to their continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import IA3Error
from .data import render_chat


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

    pad, width = tokenizer.pad_token_id, max(map(len, prompts))
    # Filled up on the left: what is generated begins in the same column for all.
    ids = torch.tensor([[pad] * (width - len(tokens)) + list(tokens) for tokens in prompts])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts])
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if stop:
        options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    device = next(model.parameters()).device
    set_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pad_token_id=pad,
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
