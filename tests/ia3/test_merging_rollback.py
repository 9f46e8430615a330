"""Merging that fails while it is taken back, or meets what others did: no state disagrees with the weights."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import ia3
from ia3.merging import layer as merging
from ia3.merging import quantized

from .conftest import perturb
from .quantizing import KINDS, linear


def _two_adapters(module: nn.Module, library: Any = ia3, *, of_second: list[str] | None = None) -> Any:
    names = [name for name, _ in module.named_children()]
    model = library.get_peft_model(module, library.IA3Config(target_modules=names, feedforward_modules=[]))
    model.add_adapter("other", library.IA3Config(target_modules=of_second or names, feedforward_modules=[]))
    perturb(model)
    return model


def test_what_cannot_be_taken_back_does_not_keep_the_rest_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base = nn.Sequential()
    base.add_module("a", nn.Linear(64, 64))
    base.add_module("b", nn.Linear(64, 64))
    base.b.weight = base.a.weight
    base.add_module("q", KINDS["torchao int8"](linear())[0])
    model = _two_adapters(base)
    model.merge_adapter(["default"])
    merged = base.a.base_layer.weight.detach().clone()

    def fail(layer: nn.Module, factors: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(quantized, "_scale", fail)  # once more when it is taken back
        with pytest.raises(MemoryError):
            model.base_model.swap_adapter("default", "other")
    assert [layer.merged_adapters for _, layer in model.base_model.scaled_layers()] == [["default"]] * 3
    assert torch.equal(base.a.base_layer.weight, merged)
    model.unmerge_adapter()
    assert base.a.base_layer.weight is base.b.base_layer.weight


def test_what_peft_merged_is_not_swapped_and_not_forgotten() -> None:
    base = nn.Sequential()
    base.add_module("a", nn.Linear(4, 4))
    base.add_module("b", nn.Linear(4, 4))
    model = _two_adapters(base, peft, of_second=["a"])
    for layer in (base.a, base.b):
        for vector in layer.ia3_l.values():
            nn.init.uniform_(vector, 0.5, 1.5)  # none is zero, by which PEFT would divide
    before = base.b.base_layer.weight.detach().clone()
    model.merge_adapter(["default"])
    ia3.accelerate(model)
    with pytest.raises(ia3.IA3Error, match=r"default was merged into 'a' before the model was accelerated"):
        model.base_model.swap_adapter("default", "other")
    assert base.a.merged_adapters == base.b.merged_adapters == ["default"]
    with pytest.warns(UserWarning, match="can be inaccurate"):
        model.unmerge_adapter()
    torch.testing.assert_close(base.b.base_layer.weight.detach(), before)


def _merged() -> tuple[Any, Any]:
    base = nn.Sequential()
    base.add_module("a", nn.Linear(4, 4))
    model = _two_adapters(base)
    model.merge_adapter(["default"])
    return model, base.a


def test_a_merged_weight_that_was_written_to_is_not_moved() -> None:
    model, layer = _merged()
    with torch.no_grad():
        layer.base_layer.weight.add_(1)
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ia3.IA3Error, match="was written to while default was merged"):
        model.to(torch.bfloat16)
    assert torch.equal(layer.base_layer.weight, before)


def test_vectors_that_could_not_be_put_back_act_beside_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = _merged()
    x = torch.randn(2, 4)
    expected, note, calls = model(x), merging._note, list[int]()

    def interrupted(layer: Any, state: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # while they are put back
            raise KeyboardInterrupt
        note(layer, state)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.to(torch.float32)
    assert not layer.merged
    torch.testing.assert_close(model(x), expected)
