"""TRL's trainers on this package's models, and what its weight sync does to the weights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ia3

from .conftest import BY_NAME, perturb
from .helpers import word_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

_CONFIG: dict[str, Any] = {"task_type": "CAUSAL_LM"}
_KEYS = "model.layers.1.self_attn.k_proj"


def test_sft_takes_a_configuration(tmp_path: Path) -> None:
    rows = [{"input_ids": row} for row in BY_NAME["llama"].inputs()["input_ids"].tolist()]
    trainer = trl.SFTTrainer(
        model=BY_NAME["llama"].build(),
        args=trl.SFTConfig(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=ia3.IA3Config(**_CONFIG),
    )
    trainer.train()
    trained = [value for key, value in trainer.model.named_parameters() if "ia3_l" in key]
    assert trained
    assert not all(bool((vector == 1).all()) for vector in trained)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("way", ["get_peft_model", "peft_config and accelerate"])
def test_grpo_trains_vectors_and_nothing_else(way: str, beta: float, tmp_path: Path) -> None:
    base = BY_NAME["llama"].build()
    weights = {name: value.detach().clone() for name, value in base.state_dict().items()}
    model, peft_config = base, ia3.IA3Config(**_CONFIG)
    if way == "get_peft_model":
        model, peft_config = ia3.get_peft_model(base, peft_config), None
    tokenizer = word_tokenizer()

    def reward(completion_ids: list[list[int]], **other: Any) -> list[float]:
        return [sum(token % 2 for token in tokens) / max(1, len(tokens)) for tokens in completion_ids]

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=20,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            learning_rate=0.05,
            beta=beta,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d e f"}] * 20),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if peft_config is not None:
        ia3.accelerate(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 20
    losses = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert any(entry["reward_std"] > 0 for entry in losses)
    assert "fused into LlamaMLP" in str(ia3.report(trainer.model))
    vectors = {name: value for name, value in trainer.model.named_parameters() if "ia3_l" in name}
    trained = [value for name, value in vectors.items() if name.endswith("default")]
    assert len(trained) == 6
    assert all(bool(value.isfinite().all()) and not bool((value == 1).all()) for value in trained)
    # What TRL compares with: a frozen copy of an adapter that was there before, else the model without its adapter.
    reference = [value for name, value in vectors.items() if name.endswith("ref")]
    assert len(reference) == (6 if beta and way == "get_peft_model" else 0)
    assert all(bool((value == 1).all()) for value in reference)
    unloaded = trainer.model.unload().state_dict()
    assert all(torch.equal(unloaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("way", ["get_peft_model", "accelerate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_thousand_weight_syncs_leave_every_bit(way: str, dtype: torch.dtype) -> None:
    """TRL's own generator of weights: merge, read all of them, unmerge; with other vectors each time."""
    generation = pytest.importorskip("trl.generation.vllm_generation")
    peft = pytest.importorskip("peft")
    base = BY_NAME["llama"].build().to(dtype)
    weights = {name: value.detach().clone() for name, value in base.state_dict().items()}
    if way == "get_peft_model":
        model = ia3.get_peft_model(base, ia3.IA3Config(**_CONFIG))
    else:
        model = ia3.accelerate(peft.get_peft_model(base, peft.IA3Config(**_CONFIG)))
    sync = generation.VLLMGeneration.__new__(generation.VLLMGeneration)
    sync.model = model
    sync._dist = SimpleNamespace(gather_params=lambda parameters: contextlib.nullcontext(), is_fsdp=False)
    for step in range(1000):
        perturb(model, seed=step)
        sent = {name: value.clone() for name, value in sync._iter_named_params()}
        assert sent.keys() == weights.keys()
        vector = model.get_parameter(f"base_model.model.{_KEYS}.ia3_l.default").detach()
        assert torch.equal(sent[f"{_KEYS}.weight"], (weights[f"{_KEYS}.weight"].float() * vector).to(dtype))
    unmerged = model.unload().state_dict()
    wrong = sum(int((unmerged[name] != value).sum()) for name, value in weights.items())
    assert wrong == 0
