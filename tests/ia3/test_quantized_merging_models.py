"""Merging into quantized weights, over whole models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import ia3
from ia3.merging import formats, quantized

from .conftest import perturb
from .quantizing import KINDS, dequantized_model, eager_model, loaded
from .test_quantized_merging import _codes, _snapshot


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def folder(families: dict[str, Any], tmp_path: Path) -> Path:
    """A tiny Llama whose features fill the blocks of 64 that bitsandbytes packs, with logits that vectors matter to."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "mlp_bias": True}
    model = families["llama"].build(**sizes, initializer_range=0.2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.bias.normal_(generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def _adapted_model(base: Any, **arguments: Any) -> ia3.PeftModel:
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM", **arguments))
    perturb(model)
    return model.train()  # an evaluation lays 4-bit weights out anew


@pytest.mark.parametrize("also_up", [False, True], ids=["default targets", "up_proj too"])
def test_a_merged_model_computes_what_it_did(folder: Path, kind: str, batch: dict[str, Tensor], also_up: bool) -> None:
    """And is as near to the formula in fp64 on the dequantized weights."""
    targets = {"target_modules": ["k_proj", "v_proj", "up_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = _adapted_model(loaded(folder, kind), **(targets if also_up else {}))
    with torch.no_grad():
        unmerged = model(**batch).logits.double()
        exact = _with_biases(eager_model(model)[0], kind)(**batch).logits
        before = _snapshot(model)
        model.merge_adapter(safe_merge=True)
        merged = model(**batch).logits.double()
        assert all(layer.merged for _, layer in model.base_model.scaled_layers())
        assert (merged - exact).norm() <= 2 * (unmerged - exact).norm()
        assert (unmerged - exact).norm() < 0.2 * exact.norm()  # else it would say little
        rows = {row.module.rpartition(".")[2]: row.reason for row in ia3.report(model).rows}
        assert rows["k_proj"] == "the adapter is merged into the scales"
        assert rows["down_proj"].endswith(".mlp.up_proj")
        model.unmerge_adapter()
        assert _snapshot(model) == before
        assert torch.equal(model(**batch).logits.double(), unmerged)


def _with_biases(base: Any, kind: str) -> Any:
    """The model dequantized in fp64, with the biases that its quantized layers had."""
    biases = {path: module.bias for path, module in base.named_modules() if getattr(module, "bias", None) is not None}
    plain = dequantized_model(base, kind)
    for path, bias in biases.items():
        plain.get_submodule(path).bias = nn.Parameter(bias.detach().double())
    return plain


def test_merge_and_unload_leaves_plain_quantized_layers(folder: Path, kind: str, batch: dict[str, Tensor]) -> None:
    model = _adapted_model(loaded(folder, kind))
    kinds = {path: type(module) for path, module in loaded(folder, kind).named_modules()}
    codes = {path: _codes(layer.base_layer) for path, layer in model.base_model.scaled_layers()}
    model.merge_adapter()
    with torch.no_grad():
        expected = model(**batch).logits
        merged = model.merge_and_unload()
        assert torch.equal(merged(**batch).logits, expected)
    assert {path: type(module) for path, module in merged.named_modules()} == kinds
    assert {path: _codes(merged.get_submodule(path)) for path in codes} == codes
    assert not any(quantized._ATTRIBUTE in module.__dict__ for module in merged.modules())


def test_vectors_of_two_layers_in_one_place_are_unmerged_in_any_order(folder: Path, kind: str) -> None:
    targets = {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = _adapted_model(loaded(folder, kind), **targets)
    model.add_adapter("down", ia3.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]))
    model.add_adapter("up", ia3.IA3Config(target_modules=["up_proj"], feedforward_modules=[]))
    perturb(model)
    before = _snapshot(model)
    model.merge_adapter(["down"])
    down = _snapshot(model)
    model.merge_adapter(["up"])
    both = _snapshot(model)
    assert len({str(before), str(down), str(both)}) == 3
    model.unmerge_adapter()
    model.merge_adapter(["up"])
    up = _snapshot(model)
    model.merge_adapter(["down"])
    assert _snapshot(model) == both
    model.swap_adapter("down", "up")  # the layers that hold down let go of it, and the others keep up
    assert _snapshot(model) == up
    model.unmerge_adapter()
    assert _snapshot(model) == before


def test_an_error_half_way_leaves_every_layer_as_it_was(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _adapted_model(loaded(folder, kind))
    before, move, calls = _snapshot(model), quantized.move, 0

    def failing(route: Any, scale: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        move(route, scale)

    monkeypatch.setattr(quantized, "move", failing)
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter()
    assert calls > 5
    assert _snapshot(model) == before
    assert not any(layer.merged for _, layer in model.base_model.scaled_layers())


def test_only_exact_places_are_scales(folder: Path, kind: str) -> None:
    """With a block that computes something else, the input side has none, and nothing is merged by half."""
    model = _adapted_model(loaded(folder, kind))
    block = model.get_base_model().model.layers[1].mlp
    block.forward = lambda x: x
    before = _snapshot(model)
    with pytest.raises(
        ia3.IA3Error, match=r"'model\.layers\.1\.mlp\.down_proj' exactly.*was replaced.*requantize=True"
    ):
        model.merge_adapter()
    assert _snapshot(model) == before
    with pytest.warns(UserWarning, match=r"1 weights were quantized anew.*'model\.layers\.1\.mlp\.down_proj' most"):
        model.merge_adapter(requantize=True)
    model.unmerge_adapter()
    assert _snapshot(model) == before


def test_an_up_projection_that_is_not_quantized_takes_no_vector(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["up_proj", "lm_head"])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    model = _adapted_model(base)
    with pytest.raises(ia3.IA3Error, match=r"go into 'model\.layers\.0\.mlp\.up_proj', which is not quantized"):
        model.merge_adapter()


@pytest.mark.parametrize("bits", [8, 4])
def test_joined_gate_and_up_projections_are_scaled_in_their_second_half(
    families: dict[str, Any], tmp_path: Path, batch: dict[str, Tensor], bits: int
) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "initializer_range": 0.2}
    families["phi3"].build(**sizes).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    model = _adapted_model(base, target_modules=["down_proj"], feedforward_modules=["down_proj"])
    joined = base.model.layers[0].mlp.gate_up_proj
    known: Any = formats.format_of(joined)
    scales, before = known.scales(known.read(joined)).reshape(256, -1), _snapshot(model)
    with torch.no_grad():
        expected = model(**batch).logits
        model.merge_adapter()
        merged = known.scales(known.read(joined)).reshape(256, -1)
        assert torch.equal(merged[:128], scales[:128])
        assert not bool((merged[128:] == scales[128:]).all(1).any())
        got = model(**batch).logits
        with model.disable_adapter():
            own = model(**batch).logits
    # 16-bit (4 bits) and 8-bit (8 bits) roundings of activations on the way, against what the vector does.
    assert (got - expected).norm() < 0.2 * (own - expected).norm()
    model.unmerge_adapter()
    assert _snapshot(model) == before


def test_a_model_without_gates_ships_with_a_known_error(families: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    families["opt"].build(init_std=0.2).save_pretrained(tmp_path / "opt")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "opt", quantization_config=config, device_map="auto"
    )
    model = _adapted_model(base).eval()  # no dropout
    batch = families["opt"].inputs()
    with torch.no_grad():
        expected = model(**batch).logits
        with model.disable_adapter():
            own = model(**batch).logits
        with pytest.raises(ia3.IA3Error, match=r"'model\.decoder\.layers\.0\.fc2' exactly.*no feed-forward block"):
            model.merge_and_unload()
        with pytest.warns(UserWarning, match="2 weights were quantized anew"):
            merged = model.merge_and_unload(requantize=True)
        assert (merged(**batch).logits - expected).norm() < 0.2 * (own - expected).norm()


# --- PEFT's models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bnb 8-bit", "bnb nf4"])
def test_accelerated_models_of_peft_merge_what_peft_refuses(folder: Path, name: str, batch: dict[str, Tensor]) -> None:
    base = loaded(folder, name)
    model = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM")).train()
    perturb(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises((ValueError, NotImplementedError)):
            merge()
    model = ia3.accelerate(model)
    with torch.no_grad():
        expected = model(**batch).logits
        with model.disable_adapter():
            own = model(**batch).logits
        before = _snapshot(model)
        model.merge_adapter(safe_merge=True)
        got = model(**batch).logits
        assert (got - expected).norm() < 0.2 * (own - expected).norm()
        model.unmerge_adapter()
        assert _snapshot(model) == before
        model.merge_adapter()
        held = _snapshot(model)
        with model.disable_adapter():
            assert _snapshot(model) == before
            assert torch.equal(model(**batch).logits, own)
        assert _snapshot(model) == held
        ia3.decelerate(model)
        assert _snapshot(model) == before
        merged = ia3.accelerate(model).merge_and_unload()
        assert torch.equal(merged(**batch).logits, got)
    assert not any(isinstance(module, peft.tuners.ia3.layer.IA3Layer) for module in merged.modules())
    assert not any(quantized._ATTRIBUTE in module.__dict__ for module in merged.modules())


def test_nothing_is_warned_of_where_nothing_is_lost(folder: Path) -> None:
    model = _adapted_model(loaded(folder, "bnb 8-bit"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_and_unload()
