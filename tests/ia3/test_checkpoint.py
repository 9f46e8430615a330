"""Damaged and foreign adapters: one sentence that names the tensor, and a model that is as it was."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ia3

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.1.mlp.down_proj.ia3_l"


@pytest.fixture
def folder(tmp_path: Path, families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]) -> Path:
    adapted(families["llama"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def _cut(folder: Path, length: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])


def _from_pretrained(model: nn.Module, folder: Path) -> object:
    return ia3.PeftModel.from_pretrained(model, folder)


def _load_new(model: nn.Module, folder: Path) -> object:
    assert isinstance(model, ia3.PeftModel)
    return model.load_adapter(folder, "new")


def _load_over(model: nn.Module, folder: Path) -> object:
    assert isinstance(model, ia3.PeftModel)
    return model.load_adapter(folder, "default")


_Load = Callable[[nn.Module, Path], object]
every_way = pytest.mark.parametrize("load", [_from_pretrained, _load_new, _load_over])


@pytest.fixture
def receiver(
    load: _Load, llama: nn.Module, families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]
) -> nn.Module:
    """The model that an adapter is loaded into, in one of those ways."""
    return llama if load is _from_pretrained else adapted(families["llama"])


def _refusal(load: _Load, model: nn.Module, folder: Path, snapshot: Callable[[nn.Module], Any]) -> str:
    """The message of the error; the model is as it was."""
    before = snapshot(model)
    with pytest.raises(ia3.IA3Error) as caught:
        load(model, folder)
    assert snapshot(model) == before
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@every_way
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _rewrite(f, lambda t: t.pop(KEY)), ["lacks", KEY]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY + "x": torch.ones(1)})), ["no place for", KEY + "x"]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY: torch.ones(1, 9)})), [KEY, "[1, 9]", "[1, 48]"]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY: torch.ones(48, 1)})), [KEY, "[48, 1]", "[1, 48]"]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY: torch.ones(1, 48).int()})), [KEY, "torch.int32"]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY: torch.ones(1, 48).bool()})), [KEY, "torch.bool"]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY: torch.ones(48)})), [KEY, "[48]", "[1, 48]"]),
        (lambda f: _rewrite(f, lambda t: t.update({KEY: torch.ones(1, 0)})), [KEY, "[1, 0]", "[1, 48]"]),
        (lambda f: _rewrite(f, lambda t: t.clear()), ["lacks", "ia3_l"]),
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
    receiver: nn.Module,
    load: _Load,
    snapshot: Callable[[nn.Module], Any],
    damage: Callable[[Path], object],
    words: list[str],
) -> None:
    damage(folder)
    if load is _load_over and "adapter_config.json" in words:
        load(receiver, folder)  # the configuration is the model's own, and that of the file is not read
        return
    message = _refusal(load, receiver, folder, snapshot)
    for word in words:
        assert word in message


@every_way
def test_wherever_a_file_ends_too_early_it_is_told_and_nothing_changes(
    folder: Path, receiver: nn.Module, load: _Load, snapshot: Callable[[nn.Module], Any]
) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    names = list(load_file(folder / WEIGHTS))
    for length in [*range(0, start, 37), *range(start, len(whole), 53)]:
        (folder / WEIGHTS).write_bytes(whole[:length])
        message = _refusal(load, receiver, folder, snapshot)
        assert "is damaged" in message
        if length >= 8:
            assert f"it ends after {length} bytes" in message
            assert "inside its header" in message if length < start else any(name in message for name in names)


@every_way
def test_garbage_is_refused(
    folder: Path, receiver: nn.Module, load: _Load, snapshot: Callable[[nn.Module], Any]
) -> None:
    source = random.Random(0)
    for length in (1, 8, 9, 64, 4096):
        (folder / WEIGHTS).write_bytes(source.randbytes(length))
        assert "is damaged" in _refusal(load, receiver, folder, snapshot)
    for header in ({}, [], {KEY: {}}, {KEY: {"dtype": "F32", "shape": [1, 48], "data_offsets": [0, -192]}}):
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
        message = _refusal(load, receiver, folder, snapshot)
        assert ("lacks the tensor" if header == {} else "is damaged") in message


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # a flipped name is an unknown field
def test_a_flipped_bit_is_refused_or_harmless(
    families: dict[str, Any],
    adapted: Callable[..., ia3.PeftModel],
    snapshot: Callable[[nn.Module], Any],
    name: str,
    file: str,
    tmp_path: Path,
) -> None:
    family = dataclasses.replace(families[name], sizes={**families[name].sizes, "num_hidden_layers": 1})
    adapted(family).save_pretrained(tmp_path)
    base = family.build().requires_grad_(False)
    before, inside = snapshot(base), [(module, dict(module._modules)) for module in base.modules()]
    path = tmp_path / file
    whole = path.read_bytes()
    source = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole)
    refusals = []
    for position in [*range(header), *range(header, len(whole), 101)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        try:
            model = ia3.PeftModel.from_pretrained(base, tmp_path)
        except ia3.IA3Error as error:
            refusals.append(str(error))
        else:
            model.unload()
            for module, children in inside:  # PEFT leaves trained heads in the model
                module._modules.update(children)
            base.requires_grad_(False)
        # Costly, so not each time; what one flip leaves behind the next check finds.
        if position % 16 == 0:
            assert snapshot(base) == before, position
    assert snapshot(base) == before
    assert len(refusals) > header // 3
    assert not any("\n" in message for message in refusals)


@every_way
def test_a_damaged_head_changes_nothing(
    families: dict[str, Any],
    adapted: Callable[..., ia3.PeftModel],
    snapshot: Callable[[nn.Module], Any],
    load: _Load,
    tmp_path: Path,
) -> None:
    adapted(families["bert"]).save_pretrained(tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    receiver = families["bert"].build() if load is _from_pretrained else adapted(families["bert"])
    for key in ("base_model.model.classifier.weight", "base_model.model.classifier.bias"):
        for bad, words in (
            (None, ["lacks"]),
            (whole[key][:-1].clone(), ["shape"]),
            (whole[key].long(), ["torch.int64"]),
        ):
            tensors = {**whole, key: bad} if bad is not None else {k: v for k, v in whole.items() if k != key}
            save_file(tensors, tmp_path / WEIGHTS)
            message = _refusal(load, receiver, tmp_path, snapshot)
            assert all(word in message for word in [key, *words])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_gathered_state_dict_is_what_is_saved(
    families: dict[str, Any], adapted: Callable[..., ia3.PeftModel], name: str, tmp_path: Path
) -> None:
    model = adapted(families[name])
    state = {key: value * 3 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state, save_embedding_layers=True)
    model.save_pretrained(tmp_path / "own", save_embedding_layers=True)
    own = load_file(tmp_path / "own" / WEIGHTS)
    given = load_file(tmp_path / "given" / WEIGHTS)
    assert any("embed" in key for key in own)
    assert given.keys() == own.keys()
    assert all(torch.equal(given[key], value * 3) for key, value in own.items())
    for key in [key for key in state if "ia3_l" in key or "modules_to_save" in key]:
        with pytest.raises(ia3.IA3Error, match="state_dict lacks") as caught:
            model.save_pretrained(tmp_path / "bad", state_dict={k: v for k, v in state.items() if k != key})
        ending = key.split("modules_to_save")[-1].replace(".default", "")
        assert ending in str(caught.value).replace(".default", "")
    assert not (tmp_path / "bad").exists()


def test_only_the_selected_adapters_are_saved(
    families: dict[str, Any], adapted: Callable[..., ia3.PeftModel], tmp_path: Path
) -> None:
    model = adapted(families["llama"])
    for name in ("french", "german"):
        model.add_adapter(name, ia3.IA3Config())
    model.save_pretrained(tmp_path / "one", selected_adapters=["french"])
    model.save_pretrained(tmp_path / "two", selected_adapters=["default", "german"])
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert sorted(path.parent.name for path in tmp_path.rglob(WEIGHTS)) == ["french", "german", "two"]


def test_names_in_a_file_are_mapped(folder: Path, llama: nn.Module) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".mlp.", ".ffn.")] = tensors.pop(key)

    whole = load_file(folder / WEIGHTS)
    _rewrite(folder, rename)
    model = ia3.PeftModel.from_pretrained(llama, folder, key_mapping={r"\.ffn\.": ".mlp."})
    for key, tensor in ia3.get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, whole[key])


def test_a_model_card_says_what_the_folder_holds_and_keeps_what_was_written(folder: Path, llama: nn.Module) -> None:
    card = folder / "README.md"
    assert "library_name: peft\n" in card.read_text()
    model = ia3.PeftModel.from_pretrained(llama, folder)
    card.write_text("---\nlicense: mit\ntags:\n- mine\n---\nMy words\n")
    model.save_pretrained(folder)
    text = card.read_text()
    assert all(line in text for line in ("license: mit\n", "library_name: peft\n", "My words\n"))


def test_an_adapter_of_another_model_is_refused(
    folder: Path, families: dict[str, Any], snapshot: Callable[[nn.Module], Any]
) -> None:
    wider = families["llama"].build(intermediate_size=64)
    before = snapshot(wider)
    with pytest.raises(ia3.IA3Error, match=r"down_proj\.ia3_l.*\[1, 48\].*\[1, 64\]"):
        ia3.PeftModel.from_pretrained(wider, folder)
    assert snapshot(wider) == before


def test_loading_freezes_unless_it_is_to_be_trained(folder: Path, families: dict[str, Any]) -> None:
    frozen = ia3.PeftModel.from_pretrained(families["llama"].build(), folder)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training
    trained = ia3.PeftModel.from_pretrained(families["llama"].build(), folder, is_trainable=True)
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
    assert ia3.PeftModel.from_pretrained(llama, folder)


def test_saving_leaves_no_scratch_files_and_replaces_an_older_adapter(
    folder: Path, families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]
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
    tmp_path: Path, families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]
) -> None:
    model = adapted(families["llama"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ia3.IA3Error, match="a file of that name exists"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="other"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["other"])
    assert not (tmp_path / "new").exists()
