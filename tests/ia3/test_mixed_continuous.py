"""Continuous batching with an adapter for each request: what each generates is what it generates alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

import ia3
from ia3 import IA3Error

from .test_mixed import MIX, adapted, alone, banked, in_bank

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11], [3, 4, 5, 6, 7, 8, 9], [12, 13, 14], [3, 4, 5, 6, 7, 8, 9], [20]]
NAMES = [*MIX, "third", "first"]
SETTINGS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 63}


def config() -> ContinuousBatchingConfig:
    """Room for nine tokens a step, so that prompts are cut and sequences join while others are under way."""
    return ContinuousBatchingConfig(num_blocks=64, page_size=4, max_batch_tokens=9, max_requests_per_batch=5)


@pytest.mark.parametrize("place", ["own", "bank"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])  # another brings a logits processor, with its own argument
def test_each_request_is_what_it_is_alone(families: dict[str, Any], place: str, temperature: float) -> None:
    model = adapted(families["llama"])
    bank = banked(model) if place == "bank" else None
    settings = SETTINGS | {"max_new_tokens": 5}
    generation = GenerationConfig(**settings)
    if temperature != 1.0:
        # Sampling from one token: greedy, by way of the processors.
        generation = GenerationConfig(**settings | {"do_sample": True, "temperature": temperature, "top_k": 1})
    batching = config()
    batching.per_request_processors = temperature != 1.0
    results = model.generate_batch(
        PROMPTS,
        adapter_names=in_bank(NAMES) if bank else NAMES,
        generation_config=generation,
        continuous_batching_config=batching,
    )
    assert list(results) == [f"req_{number}" for number in range(len(PROMPTS))]
    for prompt, name, result in zip(PROMPTS, NAMES, results.values(), strict=True):
        assert result.error is None
        ids = torch.tensor([prompt])
        expected = alone(model, name, model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        assert result.generated_tokens == expected[0, len(prompt) :].tolist()
    assert bank is None or bank.report().in_use == 0
    assert not model.get_base_model()._forward_pre_hooks
    assert not model.get_base_model()._forward_hooks


def test_wrong_names_are_a_sentence_and_no_names_the_base_models_own(families: dict[str, Any]) -> None:
    model = adapted(families["llama"])
    for names, said in ((["first"], "1 names, and there are 6 inputs"), (["nobody"] * 6, "no adapter 'nobody'")):
        with pytest.raises(IA3Error, match=said):
            model.generate_batch(PROMPTS, adapter_names=names)
    generation = GenerationConfig(**SETTINGS, max_new_tokens=3)
    model.set_adapter("second")
    plain = model.generate_batch(PROMPTS, generation_config=generation, continuous_batching_config=config())
    named = model.generate_batch(
        PROMPTS, generation_config=generation, continuous_batching_config=config(), adapter_names=["second"] * 6
    )
    assert [r.generated_tokens for r in plain.values()] == [r.generated_tokens for r in named.values()]
    assert isinstance(model, ia3.PeftModel)
