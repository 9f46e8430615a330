"""Frozen linear layers beside adapted ones: when they run our matmul, what it computes, and how it is taken back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ia3
from ia3 import layers, patching
from tests.ia3_kernels.helpers import needs_native

from .conftest import BY_NAME

pytestmark = needs_native
BF16 = torch.bfloat16


class _Mixed(nn.Module):
    """A layer with a vector between two without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.middle = nn.Linear(32, 32)
        self.last = Conv1D(40, 32)
        nn.init.normal_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(self.first(x)))
        return y


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of the weights that went through our matmul."""
    seen: list[int] = []
    ours = layers.scaled_linear

    def spy(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        seen.append(weight.data_ptr())
        return ours(x, weight, *args)

    monkeypatch.setattr(layers, "scaled_linear", spy)
    return seen


def _adapted(dtype: torch.dtype = BF16) -> Any:
    torch.manual_seed(0)
    config = ia3.IA3Config(target_modules=["middle"], feedforward_modules=[])
    return ia3.get_peft_model(_Mixed().to(dtype), config)


def _ends(model: Any) -> list[nn.Module]:
    return [model.model.first, model.model.last]


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_in_16_bits_frozen_layers_run_our_matmul(multiplied: list[int], dtype: torch.dtype, rows: int) -> None:
    model = _adapted(dtype)
    x = torch.randn(2, rows, 24).to(dtype)
    with torch.no_grad():
        y = model(x)
    assert multiplied == [layer.weight.data_ptr() for layer in (model.first, model.middle.base_layer, model.last)]
    with torch.no_grad():
        exact = model.double()(x.double())
    assert float((y - exact).norm() / exact.norm()) < 3 * torch.finfo(dtype).eps


def test_in_fp32_they_are_the_base_models_own_to_the_bit(multiplied: list[int]) -> None:
    model = _adapted(torch.float32)
    x = torch.randn(3, 24)
    first, _ = _ends(model)
    model(x)
    assert multiplied == [model.middle.base_layer.weight.data_ptr()]
    assert torch.equal(first(x), F.linear(x, first.weight, first.bias))
    with torch.autocast("cpu", BF16):  # where the library's would be the 16-bit one
        assert first(x).dtype == BF16
    assert first.weight.data_ptr() in multiplied


def test_they_pass_gradients_on(multiplied: list[int]) -> None:
    model = _adapted()
    x = torch.randn(40, 24).to(BF16).requires_grad_()
    first, _ = _ends(model)
    dy = torch.randn(40, 32).to(BF16)
    (dx,) = torch.autograd.grad(first(x), x, dy)
    assert multiplied
    exact = dy.double() @ first.weight.double()
    assert float((dx - exact).norm() / exact.norm()) < torch.finfo(BF16).eps


def test_a_weight_that_is_trained_is_torchs(multiplied: list[int]) -> None:
    model = _adapted()
    first, _ = _ends(model)
    first.requires_grad_(True)
    first(torch.randn(40, 24).to(BF16)).float().sum().backward()
    assert first.weight.grad is not None
    assert first.weight.data_ptr() not in multiplied


def test_heads_trained_whole_take_part_once_they_are_frozen(multiplied: list[int]) -> None:
    base = BY_NAME["bert"].build().to(BF16)
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="SEQ_CLS"))
    head = model.get_submodule("classifier").modules_to_save["default"]
    inputs = BY_NAME["bert"].inputs()
    model(**inputs)
    assert head.weight.data_ptr() not in multiplied
    model.requires_grad_(False)
    model(**inputs)
    assert head.weight.data_ptr() in multiplied


def test_copies_run_on_their_own_weights() -> None:
    model = _adapted()
    first, last = _ends(model)
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        copied.weight.data.zero_()
        assert torch.equal(copied(torch.randn(2, 24).to(BF16)), first.bias.expand(2, 32))
    copied = copy.deepcopy(model)
    copied.model.last.weight.data.zero_()
    assert torch.equal(copied(torch.randn(2, 24).to(BF16)), last.bias.expand(2, 40))


def test_replicas_run_on_their_own_weights() -> None:
    """What ``nn.DataParallel`` makes of a model on every device: modules without parameters, given others."""
    model = BY_NAME["llama"].build().to(BF16)
    model = ia3.get_peft_model(model, ia3.IA3Config(task_type="CAUSAL_LM"))
    for module in (model.get_submodule("model.lm_head"), model.get_submodule("model.model.layers.0.mlp")):
        replica = module._replicate_for_data_parallel()
        assert replica.forward.args[0] is replica
        assert module.forward.args[0] is module
    replica = model.get_submodule("model.lm_head")._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(64, 32, dtype=BF16), None
    assert not replica(torch.randn(3, 32).to(BF16)).any()


def test_they_are_restored_with_the_model() -> None:
    model = _adapted()
    ends = _ends(model)
    assert all(patching.is_replaced(layer) for layer in ends)
    base = model.unload()
    assert not any("forward" in module.__dict__ for module in base.modules())


def test_a_failed_adapter_leaves_a_base_model_alone() -> None:
    base = _Mixed().to(BF16)
    with pytest.raises(ia3.IA3Error):
        ia3.get_peft_model(base, ia3.IA3Config(target_modules=["absent"], feedforward_modules=[]))
    layers.speed_up_frozen(base)  # without a vector in it there is nothing to do
    assert not any("forward" in module.__dict__ for module in base.modules())


def test_an_adapter_on_a_layer_that_was_patched() -> None:
    model = _adapted()
    other = ia3.IA3Config(target_modules=["first", "last"], feedforward_modules=["last"], fan_in_fan_out=True)
    model.add_adapter("other", other)
    model.set_adapter("other")
    assert patching.is_replaced(model.model.middle) is False
    model.model.first.ia3_l["other"].data.fill_(2.0)
    x = torch.randn(2, 24).to(BF16)
    base = model.model.first.base_layer
    assert torch.equal(model.model.first(x), (2 * F.linear(x.float(), base.weight.float(), base.bias.float())).to(BF16))


def test_hooks_of_accelerate_stay_around_them(multiplied: list[int]) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = _adapted()
    first, _ = _ends(model)
    calls = []

    class Hook(hooks.ModelHook):  # type: ignore[name-defined, misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    hooks.add_hook_to_module(first, Hook())
    layers.speed_up_frozen(model)  # again, as another adapter would
    x = torch.randn(2, 24).to(BF16)
    first(x)
    assert calls == [first]
    assert first.weight.data_ptr() in multiplied
    layers.give_back_frozen(model)
    first(x)
    hooks.remove_hook_from_module(first)
    assert torch.equal(first(x), F.linear(x, first.weight, first.bias))
