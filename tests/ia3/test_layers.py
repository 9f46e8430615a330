"""One layer: both sides, both kinds of base layer, several adapters, and bases with a mind of their own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ia3 import IA3Error

from .helpers import scaled_layer


def _base(kind: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(6, 4, bias=bias)
    layer = Conv1D(4, 6)
    nn.init.normal_(layer.bias)
    return layer


def _layer(kind: str, is_feedforward: bool, adapters: tuple[str, ...] = ("default",)) -> Any:
    return scaled_layer(_base(kind).requires_grad_(False), is_feedforward, adapters)


def _formula(layer: Any, x: Tensor) -> Tensor:
    scale = torch.ones(())
    for name in layer.active_adapters:
        scale = scale * layer.ia3_l[name].flatten()
    return layer.base_layer(x * scale) if layer.is_feedforward else layer.base_layer(x) * scale


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("is_feedforward", [False, True])
@pytest.mark.parametrize("adapters", [("default",), ("default", "second")])
def test_results_and_gradients(kind: str, is_feedforward: bool, adapters: tuple[str, ...]) -> None:
    layer = _layer(kind, is_feedforward, adapters)
    assert layer.ia3_l["default"].shape == ((1, 6) if is_feedforward else (4, 1))
    with torch.no_grad():
        layer.ia3_l["default"].view(-1)[1] = 0.0
    x = torch.randn(2, 3, 6, requires_grad=True)
    inputs = [x, *layer.ia3_l.values()]
    y, expected = layer(x), _formula(layer, x)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad((y * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_feedforward", [False, True])
def test_a_base_with_hooks_or_of_another_class_runs_itself(is_feedforward: bool) -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x = torch.randn(3, 6)
    layer = scaled_layer(Doubling(6, 4), is_feedforward)
    torch.testing.assert_close(layer(x), _formula(layer, x))

    hooked = _layer("linear", is_feedforward)
    hooked.base_layer.register_forward_hook(lambda *arguments: arguments[2] + 1)
    torch.testing.assert_close(hooked(x), _formula(hooked, x))

    parametrized = _layer("linear", is_feedforward)
    nn.utils.parametrizations.weight_norm(parametrized.base_layer)
    torch.testing.assert_close(parametrized(x), _formula(parametrized, x))


def test_without_an_active_vector_it_is_the_base_layer() -> None:
    layer = _layer("linear", True)
    x = torch.randn(3, 6)
    for change in (lambda: layer.set_adapter([]), lambda: layer.set_adapter(["elsewhere"])):
        change()
        assert torch.equal(layer(x), layer.base_layer(x))
    layer.set_adapter(["default"])
    layer._disable_adapters = True
    assert layer.disable_adapters
    assert torch.equal(layer(x), layer.base_layer(x))


def test_it_shows_what_the_base_layer_shows() -> None:
    layer = _layer("conv1d", False)
    assert (layer.in_features, layer.out_features, layer.fan_in_fan_out) == (6, 4, True)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert layer.get_base_layer() is layer.base_layer
    assert not layer.merged
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "ia3_l.default"}


def test_vectors_are_fp32_over_any_base() -> None:
    layer = scaled_layer(nn.Linear(6, 4).bfloat16(), False, init_ones=True)
    assert layer.ia3_l["default"].dtype == torch.float32
    assert bool((layer.ia3_l["default"] == 1).all())
    assert layer(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_does_what_it_does_for_linear() -> None:
    layer = _layer("linear", True)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), _formula(layer, x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)


def test_copies_and_pickles_are_their_own() -> None:
    layer = _layer("linear", True)
    x = torch.randn(3, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        twin.ia3_l["default"].data.zero_()
        assert not torch.equal(twin(x), layer(x))


def test_layers_that_vectors_cannot_scale_are_refused() -> None:
    with pytest.raises(IA3Error, match="Embedding"):
        scaled_layer(nn.Embedding(3, 2), False)
