"""Banks that are asked for what cannot be, and what becomes of adapters that wait in files that others reach."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3

from ..ia3.conftest import BY_NAME
from .conftest import CONFIG
from .harness import NO_FILES, put, refused
from .test_adapter_files import ESCAPE

KEY = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
IDS = BY_NAME["llama"].inputs()["input_ids"]
CAPACITIES: list[Any] = [None, 0, -1, True, 1.5, "3", [], 10**9, 10**12, 10**30, float("inf"), ESCAPE, "x" * 10_000]


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda value: ascii(value)[:12])
def test_a_capacity(capacity: Any, is_new: bool, model: Any) -> None:
    base = BY_NAME["llama"].build() if is_new else model
    before = [(id(module), type(module)) for module in base.modules()]
    trainable = [parameter.requires_grad for parameter in base.parameters()]
    arguments = (CONFIG, capacity) if is_new else (capacity,)
    refused(lambda: ia3.AdapterBank(base, *arguments), "capacity is|model is a")
    assert [(id(module), type(module)) for module in base.modules()] == before
    assert [parameter.requires_grad for parameter in base.parameters()] == trainable


@pytest.mark.parametrize("folder", ["/dev/null", "/proc/none", "x" * 5000])
def test_a_folder(folder: str) -> None:
    base = BY_NAME["llama"].build()
    before = [id(module) for module in base.modules()]
    refused(lambda: ia3.AdapterBank(base, CONFIG, 2, folder=folder), "cannot write into")
    assert [id(module) for module in base.modules()] == before
    assert len(ia3.AdapterBank(base, CONFIG, 2)) == 0


@pytest.mark.parametrize("limit", [0, -1, True, "3", 1.5])
def test_a_limit(limit: Any, model: Any) -> None:
    refused(lambda: ia3.AdapterBank(model, 2, host_limit=limit), "host_limit is")


NAMES: list[tuple[Any, str]] = [
    ("", "the adapter's name is ''"),
    (None, "name is None"),
    (3, "name is 3"),
    (["a"], "name is"),
    ("__base__", "other than '__base__'"),
    ("default", "the model itself has an adapter 'default'"),
    ("there", "the bank has an adapter 'there' already"),
]


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_a_name(number: int, model: Any) -> None:
    name, said = NAMES[number]
    bank = ia3.AdapterBank(model, 2)
    bank.load("there", {KEY: torch.ones(16, 1)})
    refused(lambda: bank.load(name, {KEY: torch.ones(16, 1)}), said)
    assert list(bank) == ["there"]


SOURCES: list[tuple[Any, str]] = [
    ({}, "holds no vectors"),
    (3, "source is a int"),
    (None, "source is a NoneType"),
    ({KEY: torch.ones(16)}, "of shape"),
    ({KEY: torch.ones(16, 1, dtype=torch.int8)}, "dtype torch.int8"),
    ({KEY: torch.full((16, 1), torch.nan)}, "not finite"),
    ({KEY: torch.full((16, 1), 1e300, dtype=torch.float64)}, "not finite"),
    ({ESCAPE: torch.ones(16, 1)}, r"'\\x1b"),
    ({"x" * 10_000: torch.ones(16, 1)}, "no place"),
    ("there-is-none", "no local folder|no adapter_config"),
    ("\0", "no adapter_config|no local folder"),
]


@pytest.mark.parametrize("number", range(len(SOURCES)))
def test_a_source(number: int, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source, said = SOURCES[number]
    bank = ia3.AdapterBank(model, 2)
    refused(lambda: bank.load("a", source), said, seconds=5)
    assert len(bank) == 0


def _changed(change: Callable[[bytearray], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return damage


def _flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


EVICTED: dict[str, Callable[[Path], object]] = {
    "half": _changed(lambda content: content.__delitem__(slice(len(content) // 2, None))),
    "three-quarters": _changed(lambda content: content.__delitem__(slice(3 * len(content) // 4, None))),
    "less-a-number": _changed(lambda content: content.__delitem__(slice(-4, None))),
    "less-a-byte": _changed(lambda content: content.pop()),
    "empty": _changed(bytearray.clear),
    "longer": _changed(lambda content: content.extend(b"\0\0\0\0")),
    "a-bit": _changed(_flip),
    "zeros": _changed(lambda content: content.__setitem__(slice(None), bytes(len(content)))),
    "gone": Path.unlink,
    **{name: lambda path, make=make: put(path, make) for name, make in NO_FILES.items()},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", EVICTED)
def test_an_evicted_adapter(name: str, model: Any, tmp_path: Path) -> None:
    bank = ia3.AdapterBank(model, 1, folder=tmp_path)

    @torch.no_grad()
    def logits(adapter: str) -> Tensor:
        return model(input_ids=IDS, adapter_names=[adapter] * len(IDS)).logits  # type: ignore[no-any-return]

    bank.load("a", {KEY: torch.full((16, 1), 3.0)})
    right = logits("a")
    bank.load("b", {KEY: torch.full((16, 1), 0.5)})
    other = logits("b")
    assert torch.equal(logits("a"), right)
    assert torch.equal(logits("b"), other)
    (file,) = (path for path in tmp_path.glob("evicted-*/*") if path.read_bytes().count(b"\0\0\x40\x40"))
    EVICTED[name](file)
    refused(lambda: logits("a"), "the evicted adapter in .* cannot be read: .*; load it again")
    assert torch.equal(logits("b"), other)
    bank.load("a", {KEY: torch.full((16, 1), 3.0)}, replace=True)
    assert torch.equal(logits("a"), right)


def test_evicted_files_are_written_where_nothing_can_lie_already(model: Any, tmp_path: Path) -> None:
    """Whatever others put there: the folder is new, its owner's alone, and names in it are random."""
    (tmp_path / "victim").write_text("old")
    bank = ia3.AdapterBank(model, 1, folder=tmp_path)
    (folder,) = tmp_path.glob("evicted-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    for number in range(50):
        (folder / str(number)).symlink_to(tmp_path / "victim")
    for name in "abc":
        bank.load(name, {KEY: torch.ones(16, 1)})
    assert (tmp_path / "victim").read_text() == "old"
    assert len([path for path in folder.iterdir() if not path.is_symlink()]) == 2
    bank.close()
    assert os.listdir(tmp_path) == ["victim"]
