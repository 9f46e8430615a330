"""How vLLM finds the plugin, what it is told of it, and how adapters are found by name."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin as runner

import ia3_vllm
from ia3.errors import IA3Error
from ia3_vllm.memory import Memory, pack
from ia3_vllm.options import Options
from ia3_vllm.resolver import NAME, FolderResolver


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LRUCacheWorkerLoRAManager", LRUCacheWorkerLoRAManager)
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    monkeypatch.setattr(current_platform, "check_and_update_config", current_platform.check_and_update_config)


def test_vllm_finds_the_plugin() -> None:
    assert [entry.load() for entry in entry_points(group="vllm.general_plugins", name="ia3")] == [ia3_vllm.register]


def test_without_its_key_an_engine_has_vllms_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(runner, "LRUCacheWorkerLoRAManager", lambda *given, **named: made.append((given, named)))
    ia3_vllm.register()
    for configured in ({}, {"other": 1}, {"ia3": False}):
        config = SimpleNamespace(additional_config=configured)
        runner.LRUCacheWorkerLoRAManager(config, "cpu", embedding_modules={})
        assert made.pop() == ((config, "cpu"), {"embedding_modules": {}})


def test_a_cpu_compiles_for_ia3_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(current_platform, "check_and_update_config", lambda config: seen.append(config.lora_config))
    ia3_vllm.register()
    for configured in ({"ia3": True}, {"ia3": {"lora": True}}, {}):
        config = SimpleNamespace(additional_config=configured, lora_config="LoRA")
        current_platform.check_and_update_config(config)
        assert config.lora_config == "LoRA"
    assert seen == [None, "LoRA", "LoRA"], "what decides whether a model is compiled"


def test_registering_again_changes_nothing() -> None:
    ia3_vllm.register()
    once = runner.LRUCacheWorkerLoRAManager
    ia3_vllm.register()
    assert runner.LRUCacheWorkerLoRAManager is once is not LRUCacheWorkerLoRAManager
    assert LoRAResolverRegistry.resolvers == {}


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "1.0", "dev", "0.25.1+cpu"])
def test_other_releases_are_left_alone(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    ia3_vllm.register()
    assert runner.LRUCacheWorkerLoRAManager is LRUCacheWorkerLoRAManager
    # One, which pytest hears at every logger that its handler is attached to.
    (said,) = {record.getMessage() for record in caplog.records if record.name == "vllm.ia3"}
    assert version in said


def test_a_folder_becomes_a_model_by_its_name(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    shutil.copytree(adapters[0], served / "mine")
    shutil.copytree(adapters[0], tmp_path / "outside")
    (served / "lora").mkdir()
    (served / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (served / "torn").mkdir()
    (served / "torn" / "adapter_config.json").write_text('{"peft_type"')
    (served / "deep").mkdir()
    (served / "deep" / "adapter_config.json").write_text("[" * 100_000)
    (served / "pipe").mkdir()
    (served / "loop").symlink_to("loop")
    os.mkfifo(served / "pipe" / "adapter_config.json")
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(served))
    ia3_vllm.register()
    resolver = LoRAResolverRegistry.get_resolver(NAME)
    assert isinstance(resolver, FolderResolver)
    found = asyncio.run(resolver.resolve_lora("base", "mine"))
    assert found is not None
    assert (found.lora_name, found.lora_path) == ("mine", str(served / "mine"))
    folders = ("lora", "torn", "deep", "pipe", "loop", "nothing")
    for name in (*folders, "../outside", ".", str(tmp_path / "outside"), "mine\0", "\ud800"):
        assert asyncio.run(resolver.resolve_lora("base", name)) is None


def test_targets_are_those_of_the_models_type_or_named() -> None:
    llama = Options.of(True, ["llama"])
    assert (set(llama.outputs), llama.inputs, llama.dtype) == ({"k_proj", "v_proj"}, ("down_proj",), torch.float32)
    assert llama.sides("model.layers.0.self_attn.k_proj") == (True, False)
    assert llama.sides("model.layers.0.mlp.down_proj") == (False, True)
    assert llama.sides("model.layers.0.self_attn.qk_proj") == (False, False)
    assert Options.of({}, ["unknown", "qwen2"]).outputs
    named = Options.of({"outputs": ["a"], "inputs": ["a"], "dtype": "bfloat16", "lora": True}, ["unknown"])
    assert named == Options(("a",), ("a",), torch.bfloat16, True)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "expected true or an object"),
        ({"target": []}, "has 'target'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"lora": 1}, "lora 1"),
        ({"outputs": "k_proj"}, "outputs 'k_proj'"),
        ({"inputs": [""]}, r"inputs \[''\]"),
        ({}, "no default targets for the model type 'unknown'"),
    ],
)
def test_options_that_mean_nothing_are_sentences(given: Any, sentence: str) -> None:
    with pytest.raises(IA3Error, match=sentence):
        Options.of(given, ["unknown"])


def test_vectors_that_do_not_fit_leave_the_older_ones() -> None:
    seen: list[str] = []

    def check(source: str, tensors: Any) -> None:
        if "bad" in tensors:
            raise IA3Error(source)
        seen.append(source)

    memory = Memory(check)
    first = memory.put("a@b", pack({"x": torch.ones(2, 1)}))
    with pytest.raises(IA3Error, match="ia3-memory:a@b@2"):
        memory.put("a@b", pack({"bad": torch.ones(1)}))
    assert memory.find(first)["x"].shape == (2, 1)
    assert memory.put("a@b", pack({"y": torch.ones(1)})) != first
    assert list(memory.find(first)) == ["y"], "the newest, for requests of an older version"
    with pytest.raises(IA3Error, match="push them again"):
        memory.find("ia3-memory:other@1")
