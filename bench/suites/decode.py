"""Seconds of one decoded token: batch 1, over a static key-value cache that already holds a context."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, StaticCache

from .. import llama
from ..measure import interleave
from ..records import Recorder
from ..settings import Settings

WARMUP = 4


def step_function(model: nn.Module, config: PretrainedConfig, prompt: Tensor, steps: int) -> Callable[[], Tensor]:
    """Fills a cache with `prompt` [1, tokens]; the function returned decodes one token more at each of `steps` calls.

    A static cache costs the same at every position: attention runs over all of its slots, under a mask.
    """
    cache = StaticCache(config, max_cache_len=prompt.shape[1] + steps)

    @torch.no_grad()
    def forward(tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    forward(prompt)
    # Always the same token, not the likeliest: near a tie, rounding would make the implementations part ways.
    token = prompt[:, :1]
    return lambda: forward(token)


def run(settings: Settings, recorder: Recorder) -> None:
    """Measures every implementation in each dtype."""
    config = llama.config(settings)
    context = 8 if settings.quick else 128
    rounds = settings.rounds(60)
    prompt = torch.randint(config.vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
    prompt = prompt.to(settings.device)
    for dtype in settings.dtypes:
        steps = {
            impl: step_function(model.eval(), config, prompt, 1 + WARMUP + rounds)
            for impl, model in llama.models(settings, dtype, settings.implementations).items()
        }
        llama.check_agreement({impl: step() for impl, step in steps.items()}, dtype)
        with _neighbour() if settings.busy else contextlib.nullcontext():
            times = interleave(steps, rounds, WARMUP, device=settings.device)
        case = f"{llama.describe(config)}, batch 1, context {context}" + (", one core taken" if settings.busy else "")
        recorder.add_times("decode", case, dtype, times, llama.BASELINES)


@contextlib.contextmanager
def _neighbour() -> Iterator[None]:
    """Let a process of its own compute within the block, as somebody else's does on a shared machine."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
