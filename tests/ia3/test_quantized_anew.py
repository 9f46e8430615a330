"""Quantized weights that are quantized anew, because no scales could hold a vector, and those that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ia3
from ia3.merging import quantized

from .quantizing import BF16, IN, OUT
from .test_quantized_merging import LAYERS, _adapted, _exact_values, _gguf, _snapshot, _vector


@pytest.fixture(params=LAYERS)
def base(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]()


ANEW = ["int8", "int8 after a forward", "fp4", "nf4 nested", "nf4 stored as bf16", "nf4 nested evaluated", "torchao",
        "Q4_0", "Q4_1", "Q8_0"]  # fmt: skip


@pytest.mark.parametrize("name", ANEW)
def test_an_input_side_without_a_gate_is_quantized_anew_only_when_asked_for(name: str) -> None:
    base = LAYERS[name]()
    model = _adapted(base, is_feedforward=True)
    before, (values, _) = _snapshot(model), _exact_values(base)
    with pytest.raises(
        ia3.IA3Error, match=r"cannot merge into '0' exactly, .*feed-forward block.*pass requantize=True"
    ):
        model.merge_adapter()
    assert _snapshot(model) == before
    with pytest.warns(UserWarning, match="1 weights were quantized anew"):
        model.merge_adapter(requantize=True)
    exact = values * _vector(model)
    error = float((_exact_values(base)[0] - exact).norm() / exact.norm())
    (row,) = ia3.report(model).rows
    assert f"{error:.2g} of its norm away" in row.reason
    # Half a step of 1/7 (4 bits) or 1/127 (8 bits) of the largest in a block, which is some 3 of its deviations, in
    # each value, would be this much of the norm; the levels of NF4 and FP4 are as far apart or farther.
    assert 0 < error < (0.02 if name in ("int8", "int8 after a forward", "torchao", "Q8_0") else 0.25)
    model.unmerge_adapter()
    assert _snapshot(model) == before


@pytest.mark.parametrize("name", ["int8", "nf4 nested", "torchao", "Q8_0"])
def test_a_weight_quantized_anew_can_be_shipped_swapped_and_disabled(name: str) -> None:
    model = _adapted(LAYERS[name](), is_feedforward=True, adapters=2).train()
    before = _snapshot(model)
    model.merge_adapter(["default"], requantize=True)
    held = _snapshot(model)
    with model.disable_adapter():
        assert _snapshot(model) == before
    assert _snapshot(model) == held
    model.swap_adapter("default", "a1")
    assert _snapshot(model) != held
    model.swap_adapter("a1", "default")
    assert _snapshot(model) == held
    merged = model.merge_and_unload()
    assert _snapshot(merged)["0.weight"] == held["base_model.model.0.base_layer.weight"]
    assert quantized._ATTRIBUTE not in merged[0].__dict__


def test_inputs_in_another_order_are_quantized_in_theirs() -> None:
    base = _gguf("Q8_0")
    base.input_permutation = torch.randperm(IN, generator=torch.Generator().manual_seed(6))
    model = _adapted(base, is_feedforward=True)
    values, _ = _exact_values(base)
    model.merge_adapter(requantize=True)
    exact = values * _vector(model)[base.input_permutation]
    assert (_exact_values(base)[0] - exact).norm() < 0.02 * exact.norm()


def _library_values(layer: Any) -> Tensor:
    bnb = pytest.importorskip("bitsandbytes")
    values: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return values


def test_blocks_that_cross_rows_have_to_be_quantized_anew() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(96, 64, bias=False, compute_dtype=BF16, quant_type="nf4").to("cpu")
    model = _adapted(layer)
    before = _snapshot(model)
    with pytest.raises(ia3.IA3Error, match=r"rows of 96 values are not whole blocks of 64.*requantize=True"):
        model.merge_adapter()
    exact = _library_values(layer) * _vector(model).float()[:, None]
    with pytest.warns(UserWarning, match="1 weights were quantized anew"):
        model.merge_adapter(requantize=True)
    # How large it is says little: some of bitsandbytes' CPU kernels misread blocks that cross rows, merged or not.
    error = float((_library_values(layer) - exact).norm() / exact.norm())
    assert f"{error:.2g} of its norm away" in ia3.report(model).rows[0].reason
    model.unmerge_adapter()
    assert _snapshot(model) == before


def test_types_that_the_package_cannot_quantize_say_so() -> None:
    layers = pytest.importorskip("transformers.integrations.gguf.utils")
    layer = layers.GgufLinear(256, 4, 14)
    layer.weight.data.zero_()
    model = _adapted(layer, is_feedforward=True)
    with pytest.raises(ia3.IA3Error, match=r"and the package gguf cannot quantize to Q6_K; run the model unmerged"):
        model.merge_adapter(requantize=True)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_layers_that_compute_something_else_are_refused(base: Any) -> None:
    base.register_forward_hook(lambda module, args, y: 2 * y)
    model = _adapted(base)
    with pytest.raises(ia3.IA3Error, match=r"cannot merge into '0', .* hooks"):
        model.merge_adapter(requantize=True)


def test_weights_that_others_use_are_refused(base: Any) -> None:
    model = _adapted(base)
    model.get_base_model().append(nn.Linear(1, 1))
    model.get_base_model()[1].weight = base.weight
    before = _snapshot(model)
    with pytest.raises(ia3.IA3Error, match="other modules use a parameter of the quantized '0' as well"):
        model.merge_adapter()
    assert _snapshot(model) == before


def test_weights_quantized_in_every_pass_are_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = _adapted(bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True))
    with pytest.raises(ia3.IA3Error, match=r"has_fp16_weights=True.*load it unquantized"):
        model.merge_adapter()
