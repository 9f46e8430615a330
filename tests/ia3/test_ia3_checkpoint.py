"""Damaged and foreign adapters: one sentence that names the tensor, and a model that is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ia3

KEY = "base_model.model.model.layers.1.mlp.down_proj.ia3_l"


@pytest.fixture
def folder(tmp_path: Path, families: dict[str, Any], adapted: Callable[..., ia3.IA3Model]) -> Path:
    adapted(families["llama"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def _cut(folder: Path, length: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _rewrite(f, lambda t: t.pop(KEY)), ["lacks", KEY]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY + "x": torch.ones(1)})), ["no place for", KEY + "x"]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY: torch.ones(1, 9)})), [KEY, "[1, 9]", "[1, 48]"]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY: torch.ones(48, 1)})), [KEY, "[48, 1]", "[1, 48]"]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY: torch.ones(1, 48).int()})), [KEY, "torch.int32"]),
        (lambda f: _cut(f, -8), ["damaged", "inside the tensor", "ia3_l"]),
        (lambda f: _cut(f, 100), ["damaged", "header"]),
        (lambda f: _cut(f, 3), ["damaged"]),
        (lambda f: _cut(f, 0), ["damaged"]),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64), ["damaged"]),
        (lambda f: (f / "adapter_model.safetensors").unlink(), ["no adapter_model.safetensors"]),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), ["pickle"]),
        (lambda f: (f / "adapter_config.json").unlink(), ["adapter_config.json"]),
        (lambda f: (f / "adapter_config.json").write_text("{"), ["adapter_config.json", "JSON"]),
    ],
)
def test_a_damaged_adapter_changes_nothing(
    folder: Path,
    llama: nn.Module,
    snapshot: Callable[[nn.Module], Any],
    damage: Callable[[Path], object],
    words: list[str],
) -> None:
    damage(folder)
    before = snapshot(llama)
    with pytest.raises(ia3.IA3Error) as caught:
        ia3.IA3Model.from_pretrained(llama, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message
    assert snapshot(llama) == before


def test_an_adapter_of_another_model_is_refused(
    folder: Path, families: dict[str, Any], snapshot: Callable[[nn.Module], Any]
) -> None:
    wider = families["llama"].build(intermediate_size=64)
    before = snapshot(wider)
    with pytest.raises(ia3.IA3Error, match=r"down_proj\.ia3_l.*\[1, 48\].*\[1, 64\]"):
        ia3.IA3Model.from_pretrained(wider, folder)
    assert snapshot(wider) == before


def test_loading_freezes_unless_it_is_to_be_trained(folder: Path, families: dict[str, Any]) -> None:
    frozen = ia3.IA3Model.from_pretrained(families["llama"].build(), folder)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training
    trained = ia3.IA3Model.from_pretrained(families["llama"].build(), folder, is_trainable=True)
    assert frozen.peft_config["default"].inference_mode
    assert not trained.peft_config["default"].inference_mode
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == {
        name for name, _ in trained.named_parameters() if "ia3_l" in name
    }


def test_entries_that_matched_nothing_in_peft_do_not_stop_loading(folder: Path, llama: nn.Module) -> None:
    config = ia3.IA3Config.from_pretrained(folder)
    assert isinstance(config.target_modules, set)
    config.target_modules.add("w9")
    config.save_pretrained(folder)
    assert ia3.IA3Model.from_pretrained(llama, folder)


def test_saving_leaves_no_scratch_files_and_replaces_an_older_adapter(
    folder: Path, families: dict[str, Any], adapted: Callable[..., ia3.IA3Model]
) -> None:
    (folder / "notes.txt").write_text("kept")
    adapted(families["llama"], target_modules=["k_proj"], feedforward_modules=[]).save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert not any("down_proj" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_what_cannot_be_saved_is_one_sentence(
    tmp_path: Path, families: dict[str, Any], adapted: Callable[..., ia3.IA3Model]
) -> None:
    model = adapted(families["llama"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ia3.IA3Error, match="a file of that name exists"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ia3.IA3Error, match="safetensors only"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    with pytest.raises(ia3.IA3Error, match="no adapter 'other'"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["other"])
    assert not (tmp_path / "new").exists()
