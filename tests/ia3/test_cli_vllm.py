"""`ia3 vllm-args`: the command that it prints, and which adapters it does not put together."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import ia3
from ia3.cli.app import main

from .commands import sentence


def _adapter(model: Path, folder: Path, **config: Any) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model)
    ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM", **config)).save_pretrained(folder)
    return folder


def _printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    assert main(["vllm-args", *map(str, arguments)]) == 0
    return shlex.split(capsys.readouterr().out)


def _after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_it_names_what_any_of_the_adapters_scales(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = _adapter(tiny_model, tmp_path / "usual one")
    other = _adapter(
        tiny_model, tmp_path / "other", target_modules=["o_proj", "down_proj"], feedforward_modules=["o_proj"]
    )
    words = _printed(capsys, usual, other)
    assert words[:3] == ["vllm", "serve", str(tiny_model)]
    assert json.loads(_after(words, "--additional-config")) == {
        "ia3": {
            "outputs": ["mlp.down_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "inputs": ["mlp.down_proj", "self_attn.o_proj"],
        }
    }
    assert _after(words, "--max-loras") == "2"
    assert words[words.index("--lora-modules") + 1 :] == [f"usual one={usual}", f"other={other}"]


def test_a_folder_of_them_is_served_by_name(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _adapter(tiny_model, tmp_path / "served" / "one")
    words = _printed(capsys, folder, "--by-name", tmp_path / "served", "--model", "a model")
    assert words[:5] == [
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        f"VLLM_LORA_RESOLVER_CACHE_DIR={tmp_path / 'served'}",
        "vllm",
        "serve",
        "a model",
    ]
    assert "--lora-modules" not in words


def test_adapters_that_do_not_go_together_are_sentences(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = _adapter(tiny_model, tmp_path / "one")
    namesake = _adapter(tiny_model, tmp_path / "elsewhere" / "one")
    assert "are both called 'one'" in sentence(capsys, ["vllm-args", one, namesake])
    foreign = _adapter(tiny_model, tmp_path / "foreign")
    path = foreign / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "another"}))
    assert "do not name one model" in sentence(capsys, ["vllm-args", one, foreign])
    assert _printed(capsys, one, foreign, "--model", "another")[2] == "another"
    assert "there is no adapter_config.json" in sentence(capsys, ["vllm-args", tmp_path])
