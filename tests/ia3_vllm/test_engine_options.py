"""Engines started otherwise: other targets, LoRA beside, two ranks; a real model; and what no engine starts with."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from vllm.config import CompilationMode
from vllm.lora.request import LoRARequest

from .answers import Oracle, generate
from .conftest import save_adapter, start

PROMPT = list(range(3, 23))


@contextmanager
def running(model: Path, **arguments: Any) -> Iterator[Any]:
    """Start an engine, and stop it; one after the other, since vLLM's ranks are global to a process."""
    llm = start(model, **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def test_other_targets_and_both_sides_and_a_narrower_dtype(model: Path, tmp_path: Path) -> None:
    """All layers of a block, the inputs of some; o_proj's and down_proj's outputs too, in tables of bf16."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    mixed = save_adapter(model, tmp_path / "mixed", 1, target_modules=targets, feedforward_modules=["o_proj"])
    plain = save_adapter(model, tmp_path / "plain", 2)
    for folder in (mixed, plain):  # vectors that bf16 holds
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({key: value.bfloat16() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    options = {
        "outputs": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        "inputs": ["o_proj", "mlp.down_proj"],
        "dtype": "bfloat16",
    }
    requests = [LoRARequest("mixed", 1, str(mixed)), LoRARequest("plain", 2, str(plain)), None]
    with running(model, max_loras=2, additional_config={"ia3": options}) as llm:
        found = generate(llm, [PROMPT] * 3, requests)
    Oracle(model, {"mixed": mixed}).check(found[:1], [PROMPT], ["mixed"])
    Oracle(model, {"plain": plain}).check(found[1:], [PROMPT] * 2, ["plain", None])


def test_lora_beside_ia3(model: Path, adapters: list[Path], tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    lora = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    torch.manual_seed(0)
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.15)
    lora.save_pretrained(tmp_path / "lora")
    oracle = Oracle(model, {"adapter0": adapters[0], "adapter1": adapters[1]})
    other = Oracle(model, {"lora": tmp_path / "lora"})
    folders = [adapters[0], tmp_path / "lora", adapters[1]]
    ours, theirs, third = [LoRARequest(folder.name, 1 + i, str(folder)) for i, folder in enumerate(folders)]
    options = {"max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8, "additional_config": {"ia3": {"lora": True}}}
    with running(model, **options) as llm:
        for requests in ([ours, theirs, None], [third, theirs, None], [ours, third, None]):  # slots change their kind
            for request, answer in zip(requests, generate(llm, [PROMPT] * 3, requests), strict=True):
                (other if request is theirs else oracle).check([answer], [PROMPT], [request and request.lora_name])


def test_a_compiled_model_is_right_for_every_mix(model: Path, adapters: list[Path]) -> None:
    requests = [None, *(LoRARequest(folder.name, 1 + i, str(folder)) for i, folder in enumerate(adapters[:3]))]
    oracle = Oracle(model, {folder.name: folder for folder in adapters[:3]})
    with running(model, max_loras=2, max_cpu_loras=2, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        for asked in (requests, requests[:1], requests[3:], [*requests[2:], None]):
            found = generate(llm, [PROMPT] * len(asked), asked)
            oracle.check(found, [PROMPT] * len(asked), [request and request.lora_name for request in asked])


def test_two_ranks_have_slices_that_make_the_whole(
    model: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    requests = [None, *(LoRARequest(folder.name, 1 + i, str(folder)) for i, folder in enumerate(adapters[:2]))]
    with running(model, max_loras=2, tensor_parallel_size=2) as llm:
        found = generate(llm, [PROMPT] * 3, requests)
    oracle = Oracle(model, {folder.name: folder for folder in adapters[:2]})
    oracle.check(found, [PROMPT] * 3, [request and request.lora_name for request in requests])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"additional_config": {"ia3": {"outputs": ["nowhere"]}}}, "no layer of this model has a name that ends with"),
        ({"additional_config": {"ia3": {"target": []}}}, "has 'target' under"),
        ({"additional_config": {"ia3": {"inputs": ["gate_proj"]}}}, "the weight cannot be split"),
        ({"fully_sharded_loras": True}, "splits LoRA's matrices"),
    ],
)
def test_what_no_engine_starts_with(model: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), running(model, **options):
        pass


def test_smollm2_says_what_transformers_and_peft_say(smollm2: Path, tmp_path: Path) -> None:
    folders = {name: save_adapter(smollm2, tmp_path / name, seed) for seed, name in enumerate("ab")}
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [
        tokenizer(text).input_ids for text in ("The capital of France is", "def fibonacci(n):", "Once upon a time")
    ]
    requests = [None, *(LoRARequest(name, 1 + i, str(folder)) for i, (name, folder) in enumerate(folders.items()))]
    pairs = [(prompt, request) for request in requests for prompt in prompts]
    asked, named = [prompt for prompt, _ in pairs], [request for _, request in pairs]
    with running(smollm2, max_loras=2) as llm:
        found = generate(llm, asked, named)
    Oracle(smollm2, folders).check(found, asked, [request and request.lora_name for request in named])
    with running(smollm2, enable_lora=False, additional_config={}, worker_extension_cls="") as llm:
        plain = generate(llm, prompts)
    for (tokens, chosen), (their_tokens, their_chosen) in zip(found[:3], plain, strict=True):
        assert tokens == their_tokens
        assert chosen == pytest.approx(their_chosen, abs=1e-4)
