"""A real engine: mixed prompts, eviction, reloading, prefix caching, adapters from memory, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

import ia3_vllm

from .answers import Oracle, generate
from .conftest import save_adapter

PROMPTS = [list(range(3, 23)), [9] * 5, [200, 7, 41, 3, 77, 150, 11]]


@pytest.fixture(scope="module")
def oracle(model: Path, adapters: list[Path]) -> Oracle:
    return Oracle(model, {folder.name: folder for folder in adapters[:6]})


@pytest.fixture
def number() -> Iterator[int]:
    return itertools.count(100)


def _request(folder: Path, number: int, **changes: Any) -> LoRARequest:
    return LoRARequest(**{"lora_name": folder.name, "lora_int_id": number, "lora_path": str(folder)} | changes)


def _check(engine: Any, oracle: Oracle, prompts: list[Any], requests: list[LoRARequest | None]) -> list[Any]:
    found = generate(engine, prompts, requests)
    oracle.check(found, prompts, [request and request.lora_name for request in requests])
    return found


def _manager(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.lora_manager


def test_prompts_of_several_adapters_and_none_share_a_batch(engine: Any, oracle: Oracle, adapters: list[Path]) -> None:
    named = [None, *(_request(folder, 1 + i) for i, folder in enumerate(adapters[:2]))]
    pairs = list(itertools.product(PROMPTS, named))
    found = _check(engine, oracle, [prompt for prompt, _ in pairs], [request for _, request in pairs])
    assert len({tuple(tokens) for tokens, _ in found[:3]}) == 3, "the adapters say what the base says"


def test_the_blocks_activation_scales_on_a_cpu(engine: Any) -> None:
    layers = _manager(engine)._adapter_manager.modules
    assert sorted({name.rpartition(".")[-1] for name in layers}) == ["down_proj", "qkv_proj"]
    assert all(layer.input_is_scaled for name, layer in layers.items() if name.endswith("down_proj"))


def test_more_adapters_than_slots_and_than_the_host_keeps(engine: Any, oracle: Oracle, adapters: list[Path]) -> None:
    requests = [_request(folder, 1 + i) for i, folder in enumerate(adapters[:6])]
    order = [*requests, *reversed(requests), None]
    _check(engine, oracle, [PROMPTS[0]] * len(order), order)
    assert len(_manager(engine).list_adapters()) <= 4


def test_one_prompt_under_two_adapters_shares_no_keys_and_values(
    engine: Any, oracle: Oracle, adapters: list[Path]
) -> None:
    prompt = [5, 9] * 40  # two blocks of tokens and more
    for request in (None, _request(adapters[0], 1), _request(adapters[1], 2), None, _request(adapters[0], 1)):
        _check(engine, oracle, [prompt], [request])


def test_an_adapter_under_another_name_and_number(engine: Any, oracle: Oracle, adapters: list[Path]) -> None:
    again = _request(adapters[0], 50, lora_name="another")
    oracle.check(generate(engine, PROMPTS, again), PROMPTS, ["adapter0"] * 3)


def test_loading_in_place_reads_once_and_not_with_every_batch(
    engine: Any, oracle: Oracle, adapters: list[Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters[0], tmp_path / "adapter0")
    request = _request(folder, 60, load_inplace=True)
    engine.llm_engine.add_lora(request)
    shutil.rmtree(folder)
    _check(engine, oracle, PROMPTS, [request] * 3)


def test_vectors_from_memory_take_the_place_of_older_ones(engine: Any, oracle: Oracle, adapters: list[Path]) -> None:
    prompt = [5, 9] * 40
    paths = set()
    for folder in (adapters[3], adapters[4], adapters[3]):
        request = ia3_vllm.push(engine, "policy", load_file(folder / "adapter_model.safetensors"))
        paths.add(request.lora_path)
        oracle.check(generate(engine, [prompt], request), [prompt], [folder.name])
    assert len(paths) == 3, "prefix blocks of one version would be read for another"
    for filler in range(5):  # evicted from the host's memory too, and found again
        engine.llm_engine.add_lora(_request(adapters[filler], 1 + filler))
    assert request.lora_int_id not in _manager(engine).list_adapters()
    oracle.check(generate(engine, [prompt], request), [prompt], ["adapter3"])
    engine.collective_rpc("ia3_drop", args=("policy",))
    engine.llm_engine.remove_lora(request.lora_int_id)
    with pytest.raises(Exception, match="push them again"):
        engine.llm_engine.add_lora(request)


def _refused(engine: Any, folder: Path, sentence: str) -> None:
    before = _manager(engine).list_adapters()
    with pytest.raises(Exception, match=sentence):
        engine.llm_engine.add_lora(_request(folder, 70))
    assert _manager(engine).list_adapters() == before


def _changed(source: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


K = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop(K), "lacks a vector of 'model.layers.0.self_attn.k_proj'"),
        (lambda tensors: tensors.update({K: torch.ones(63, 1)}), r"shape \[63, 1\].*takes.*\[64, 1\]"),
        (lambda tensors: tensors.update({K: torch.full((64, 1), torch.nan)}), "not finite"),
        (lambda tensors: tensors.update({K: torch.ones(1, 256)}), "does not scale the input"),
        (
            lambda tensors: tensors.update({K.replace("k_proj", "q_proj"): torch.ones(256, 1)}),
            "does not scale the output",
        ),
        (lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}), "no IA3 vector"),
        (lambda tensors: tensors.update({K.replace("self_attn", "experts.0"): torch.ones(2, 1)}), "of an expert"),
    ],
)
def test_files_that_do_not_fit_are_refused_whole(
    engine: Any, adapters: list[Path], tmp_path: Path, change: Any, sentence: str
) -> None:
    _refused(engine, _changed(adapters[0], tmp_path / "changed", change), sentence)


def test_damaged_and_foreign_folders_are_refused(
    engine: Any, model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    cut = shutil.copytree(adapters[0], tmp_path / "cut")
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[:-100])
    _refused(engine, cut, "is damaged: it ends after")
    lora = shutil.copytree(adapters[0], tmp_path / "lora")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    _refused(engine, lora, "has peft_type 'LORA'; expected 'IA3'")
    _refused(engine, tmp_path / "nothing", "not.*found|does not exist|No adapter found")
    saved = save_adapter(model, tmp_path / "saved", 1, modules_to_save=["lm_head"])
    _refused(engine, saved, "modules_to_save")
    with pytest.raises(Exception, match="no safetensors data"):
        engine.collective_rpc("ia3_push", args=("policy", b"nonsense"))
