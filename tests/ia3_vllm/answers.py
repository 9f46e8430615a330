"""An engine's answers, and what transformers and PEFT say to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = 10


class Oracle:
    """A model in transformers with PEFT's adapters by name; None is the base model."""

    def __init__(self, model: Path, adapters: dict[str, Path]) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model).eval()
        for name, folder in adapters.items():
            if isinstance(self._model, peft.PeftModel):
                self._model.load_adapter(folder, name)
            else:
                self._model = peft.PeftModel.from_pretrained(self._model, folder, name).eval()

    def check(self, found: Sequence[Any], prompts: Sequence[Sequence[int]], names: Sequence[str | None]) -> None:
        """Fail unless each answer is the greedy one, and its log-probabilities are within 1e-4.

        Each token is held to the best one after those before it, so that one forward tells of the whole answer.
        """
        for (tokens, chosen), prompt, name in zip(found, prompts, names, strict=True):
            scores = self._scores([*prompt, *tokens[:-1]], name)[len(prompt) - 1 :]
            best = scores.max(-1)
            assert best.indices.tolist() == tokens, name
            assert (best.values - torch.tensor(chosen)).abs().max() < 1e-4, name

    @torch.no_grad()
    def _scores(self, ids: list[int], name: str | None) -> torch.Tensor:
        batch = torch.tensor([ids])
        if name is not None:
            self._model.set_adapter(name)
        elif hasattr(self._model, "disable_adapter"):
            with self._model.disable_adapter():
                return self._model(batch).logits[0].log_softmax(-1)
        return self._model(batch).logits[0].log_softmax(-1)


def generate(llm: Any, prompts: Sequence[Sequence[int]], requests: Any = None) -> list[Any]:
    """Return an engine's greedy answers: a list of tokens and one of log-probabilities for each prompt."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = llm.generate(given, greedy, lora_request=requests, use_tqdm=False)
    return [
        (list(one.token_ids), [entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)])
        for one in (output.outputs[0] for output in outputs)
    ]
