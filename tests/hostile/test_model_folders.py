"""A model's folder, made by somebody who means no good, merged into on disk and loaded by the command line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ia3 import IA3Error
from ia3.cli import checkpoints
from ia3.merging import shards
from ia3.merging.checkpoint import plan_merge, write_merged

from .harness import NO_FILES, bounds, put, refused, tree
from .test_adapter_files import DAMAGED, ESCAPE, header

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def damage(base: Path, file: str, content: bytes) -> None:
    """Put this into a file of the model's; an index goes before the weights only where those are named otherwise."""
    if file == INDEX:
        (base / WEIGHTS).rename(base / "model-1.safetensors")
    (base / file).write_bytes(content)


def changed(**fields: Any) -> bytes:
    """Return a Llama's configuration with these fields."""
    return json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | fields).encode()


CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "as JSON"),
    "list": (b"[]", "holds a list"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "nested-objects": (b'{"text_config":' * 100_000, "nested too deeply"),
    "not-utf8": (b"\xff\xfe", "as JSON"),
    "digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "as JSON"),
    "layers": (changed(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "layers-inside": (changed(text_config={"num_hidden_layers": 10**9}), "num_hidden_layers"),
    "layers-infinite": (changed(num_hidden_layers=1).replace(b": 1}", b": 1e999}"), "num_hidden_layers inf"),
    "layers-nan": (changed(num_hidden_layers=float("nan")), "num_hidden_layers nan"),
    "heads": (changed(num_attention_heads=10**12), "num_attention_heads"),
    "experts": (changed(num_local_experts=10**12), "num_local_experts"),
    "n-layer": (changed(n_layer=10**7), "n_layer"),
}
# What only building the model tells
MODELS: dict[str, tuple[bytes, str]] = {
    "size-infinite": (changed(hidden_size=1).replace(b": 1}", b": 1e999}"), "describes no LlamaForCausalLM"),
    "size-text": (changed(hidden_size="x" * 10_000), "describes no LlamaForCausalLM"),
    "size-negative": (changed(hidden_size=-32), "describes no LlamaForCausalLM"),
    "size-nested": (changed(intermediate_size={"a": [1]}), "describes no LlamaForCausalLM"),
    "size-2-70": (changed(vocab_size=1 << 70), "describes no LlamaForCausalLM"),
    "activation": (changed(hidden_act=ESCAPE), "describes no LlamaForCausalLM"),
    "dtype": (changed(dtype=ESCAPE), "describes no LlamaForCausalLM|finds no|shape"),
    "class": (changed(architectures=["modeling_utils"]), "tied|cannot be|finds no|changes|shape"),
    "no-class": (changed(architectures=["os.system"]), "tied|finds no|changes|shape"),
    "class-number": (changed(architectures=[3]), "tied|finds no|changes|shape"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration(name: str, folders: tuple[Path, Path]) -> None:
    content, said = CONFIGS[name]
    base, adapter = folders
    damage(base, CONFIG, content)
    before = tree(base.parent)
    refused(lambda: plan_merge(base, adapter, base.parent / "out"), said)
    refused(lambda: checkpoints.locate(base), said)
    assert tree(base.parent) == before


@pytest.mark.parametrize("name", [name for name in MODELS if "class" not in name and name != "dtype"])
def test_a_configuration_of_no_model(name: str, folders: tuple[Path, Path]) -> None:
    content, said = MODELS[name]
    base, adapter = folders
    damage(base, CONFIG, content)
    refused(lambda: plan_merge(base, adapter, base.parent / "out"), said, seconds=5)


@pytest.mark.parametrize("name", ["dtype", "class", "no-class", "class-number"])
def test_a_class_that_is_none_is_never_run(name: str, folders: tuple[Path, Path]) -> None:
    """Tensors are found by their names then, or a sentence says that they are not."""
    base, adapter = folders
    damage(base, CONFIG, MODELS[name][0])
    with contextlib.suppress(IA3Error), bounds(5):
        assert len(plan_merge(base, adapter, base.parent / "out").changes) == 6
        return
    refused(lambda: plan_merge(base, adapter, base.parent / "out"), MODELS[name][1])


INDEXES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "as JSON"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "no-map": (b"{}", "no weight_map"),
    "map-list": (b'{"weight_map": []}', "no weight_map"),
    "map-nested": (b'{"weight_map": {"a": {"b": "c"}}}', "no weight_map"),
    "map-numbers": (b'{"weight_map": {"a": 1}}', "no weight_map"),
}
NAMES = ("../model-1.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", ".", "a.bin", "\0.safetensors")
NAMES += ("there-is-none.safetensors", "x" * 5000 + ".safetensors", f"{ESCAPE}.safetensors", "\ud800.safetensors")


@pytest.mark.parametrize("name", [*INDEXES, *NAMES], ids=lambda name: ascii(name)[:30])
def test_an_index(name: str, folders: tuple[Path, Path]) -> None:
    own = json.dumps({"weight_map": {"a": name}}).encode()
    content, said = INDEXES.get(name, (own, r"names the file|lacks |cannot be read"))
    base, adapter = folders
    damage(base, INDEX, content)
    before = tree(base.parent)
    refused(lambda: plan_merge(base, adapter, base.parent / "out"), said)
    assert tree(base.parent) == before


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_shard(name: str, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    damage(base, WEIGHTS, DAMAGED[name])
    before = tree(base.parent)
    refused(lambda: plan_merge(base, adapter, base.parent / "out"), "model.safetensors is damaged or cut short")
    assert tree(base.parent) == before


def _key(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith("0.self_attn.k_proj.weight"))


SHARDS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "int8": (lambda t: t.update({_key(t): t[_key(t)].to(torch.int8)}), "is stored as I8, which cannot be scaled"),
    "fp8": (lambda t: t.update({_key(t): t[_key(t)].to(torch.float8_e4m3fn)}), "which cannot be scaled"),
    "shape": (lambda t: t.update({_key(t): t[_key(t)][:8].clone()}), "has shape"),
    "flat": (lambda t: t.update({_key(t): t[_key(t)].reshape(-1)}), "has shape"),
    "missing": (lambda t: t.pop(_key(t)), "finds no"),
    "empty": (dict.clear, "finds no"),
    "twice": (lambda t: t.update({_key(t).removeprefix("model."): t[_key(t)].clone()}), "twice"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_tensors_that_do_not_fit(name: str, folders: tuple[Path, Path]) -> None:
    change, said = SHARDS[name]
    base, adapter = folders
    tensors = load_file(base / WEIGHTS)
    change(tensors)
    save_file(tensors, base / WEIGHTS)
    before = tree(base.parent)
    refused(lambda: plan_merge(base, adapter, base.parent / "out"), said)
    assert tree(base.parent) == before


def test_300000_empty_tensors(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    damage(base, WEIGHTS, header({f"model.a.long.name.of.tensor.{number}": entry for number in range(300_000)}))
    refused(lambda: plan_merge(base, adapter, base.parent / "out"), "a header of .* bytes")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, INDEX, "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file(what: str, file: str, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    if file == INDEX:
        (base / WEIGHTS).unlink()
    put(base / file, NO_FILES[what])
    before = tree(base.parent)
    is_other = file not in (CONFIG, WEIGHTS, INDEX)
    if not (is_other and what in ("folder", "sparse")):  # a folder is copied, and what is sparse refused for its size
        said = r"cannot be read|neither a file|has .* bytes|is damaged|has no|does not exist|needs .* bytes"
        refused(lambda: plan_merge(base, adapter, base.parent / "out"), said)
    if what not in ("folder", "sparse") or file == CONFIG:
        refused(lambda: checkpoints.locate(base), r"a device, a FIFO|cannot be read|has .* bytes|no model folder")
    assert tree(base.parent) == before


def test_a_file_that_the_disk_has_no_room_for(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    NO_FILES["sparse"](base / "notes.txt")
    refused(lambda: plan_merge(base, adapter, base.parent / "out"), "needs .* bytes, but .* has .* free")


@pytest.mark.parametrize("moment", ["before", "between", "at the end"])
@pytest.mark.parametrize("change", ["replaced", "cut", "longer", "written"])
def test_a_shard_that_changes_while_it_is_read(
    change: str, moment: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another merge, or by whoever trains on: the copy would be of neither."""
    base, adapter = folders
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(shards, "_THREADS", 1)
    plan, size = plan_merge(base, adapter, base.parent / "out"), (base / WEIGHTS).stat().st_size

    def attack() -> None:
        path = base / WEIGHTS
        if change == "replaced":
            path.rename(base.parent / "old")
            path.write_bytes((base.parent / "old").read_bytes())
        elif change == "cut":
            with open(path, "r+b") as file:
                file.truncate(size - 8)
        elif change == "longer":
            with open(path, "ab") as file:
                file.write(b"x")
        else:
            with open(path, "r+b") as file:
                file.seek(size - 100)
                file.write(b"x" * 50)

    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if (moment == "between" and before < size // 2 <= done) or (moment == "at the end" and done == size):
            attack()

    if moment == "before":
        attack()
    elif change == "replaced":
        pytest.skip("what is open already is the one that was planned")
    refused(lambda: write_merged(plan, base.parent / "out", advance=advance), "changed while it was read")
    assert not [path for path in base.parent.iterdir() if "out" in path.name]


OUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "exists; name a folder that does not"),
    "file": (Path.touch, "exists"),
    "fifo": (NO_FILES["fifo"], "exists"),
    "device": (NO_FILES["device"], "exists"),
    "dangling": (NO_FILES["dangling"], "exists"),
    "cycle": (NO_FILES["cycle"], "exists"),
    "link-to-base": (lambda path: path.symlink_to(path.parent / "base"), "exists"),
}


@pytest.mark.parametrize("name", [*OUTS, "base/inside", "base", "link/inside", "adapter/" + "x" * 300, "/dev/null/out"])
def test_where_nothing_can_be_made(name: str, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    out = base.parent / ("out" if name in OUTS else name)
    if name in OUTS:
        OUTS[name][0](out)
    (base.parent / "link").symlink_to(base)
    before = tree(base.parent)
    said = OUTS[name][1] if name in OUTS else "exists|lies inside|cannot write|cannot be made|no folder"
    refused(lambda: write_merged(plan_merge(base, adapter, out), out), said)
    assert tree(base.parent) == before
