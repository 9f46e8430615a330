"""Vectors merged into weights: the same results, and every bit back afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ia3

from .conftest import Family, perturb

CONVOLUTIONS = {
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "grouped conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise conv2d": lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "grouped conv3d": lambda: nn.Conv3d(4, 6, 2, groups=2),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "linear without bias": lambda: nn.Linear(4, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 4),
    **CONVOLUTIONS,
}


def _one_layer(
    library: Any, kind: str, is_feedforward: bool, dtype: torch.dtype = torch.float32, adapters: int = 1
) -> Any:
    """A model that is one layer, with adapters ``default``, ``a1``…"""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("layer", LAYERS[kind]())
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    config = library.IA3Config(
        target_modules=["layer"], feedforward_modules=["layer"] if is_feedforward else [],
        fan_in_fan_out=kind == "conv1d",
    )  # fmt: skip
    model = library.get_peft_model(base.to(dtype), config)
    for index in range(1, adapters):
        model.add_adapter(f"a{index}", config)
    perturb(model)
    return model


def _base(model: Any) -> nn.Module:
    layer: nn.Module = model.get_base_model().layer
    return layer.base_layer


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _assert_unchanged(model: nn.Module, weights: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        # As bytes: -0.0 and 0.0 differ, and a NaN is equal to itself.
        ours, theirs = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (state[name], value))
        assert torch.equal(ours, theirs), name


def _set_vectors(model: nn.Module, values: list[float], adapter: str = "default") -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f"ia3_l.{adapter}"):
                flat = parameter.view(-1)
                flat.copy_(torch.tensor(values).repeat(len(flat) // len(values) + 1)[: len(flat)])


def _formula(kind: str, is_feedforward: bool, base: nn.Module, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """The merged weight and bias in fp64, from the definition: the layer of unit inputs, scaled."""
    weight, bias = (None if p is None else p.detach().double() for p in (base.weight, base.bias))
    assert isinstance(weight, Tensor)
    scale = scale.detach().double().flatten()
    if kind == "conv1d":
        return (weight * scale[:, None], bias) if is_feedforward else (weight * scale, bias * scale)
    if not is_feedforward:
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1)), None if bias is None else bias * scale
    merged, groups = weight.clone(), getattr(base, "groups", 1)
    inside, outside = weight.shape[1], weight.shape[0] // groups
    for row in range(weight.shape[0]):
        for column in range(inside):
            merged[row, column] *= scale[row // outside * inside + column]
    return merged, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_weights_are_the_formula_rounded_once_and_come_back_to_the_bit(
    kind: str, is_feedforward: bool, dtype: torch.dtype
) -> None:
    model = _one_layer(ia3, kind, is_feedforward, dtype)
    _set_vectors(model, [0.0, -1.3, 1e-30, 1.7, -0.0, 0.9, 3.1])
    base, before = _base(model), _weights(model)
    own = list(base.parameters())
    places = [parameter.data_ptr() for parameter in own]
    weight, bias = _formula(kind, is_feedforward, base, model.get_base_model().layer.ia3_l["default"])
    model.merge_adapter()
    # fp32 products of 16-bit weights are exact in fp64, but rounded to fp32 before they are to 16 bits.
    allowed = {"rtol": 0.51 * torch.finfo(dtype).eps * (1 + 2**-12), "atol": float(torch.finfo(dtype).tiny)}
    torch.testing.assert_close(base.weight.double(), weight, **allowed)
    if base.bias is not None:
        torch.testing.assert_close(base.bias.double(), bias, **allowed)
    assert not torch.equal(base.weight, before["base_model.model.layer.base_layer.weight"])
    model.unmerge_adapter()
    _assert_unchanged(model, before)
    # In place: optimizers, ties and whoever else holds on to the parameters sees one and the same.
    assert all(a is b and a.data_ptr() == at for a, b, at in zip(base.parameters(), own, places, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("in_place", [False, True])
def test_merged_weights_are_those_of_peft(kind: str, is_feedforward: bool, in_place: bool) -> None:
    ours, theirs = (_one_layer(library, kind, is_feedforward) for library in (ia3, peft))
    if in_place:
        merged = [model.merge_and_unload().layer for model in (ours, theirs)]
    else:
        for model in (ours, theirs):
            model.merge_adapter(safe_merge=True)
        merged = [_base(model) for model in (ours, theirs)]
    assert type(merged[0]) is type(merged[1])
    for mine, of_peft in zip(merged[0].parameters(), merged[1].parameters(), strict=True):
        torch.testing.assert_close(mine, of_peft, rtol=torch.finfo(torch.float32).eps, atol=0)  # one ulp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("in_place", [False, True], ids=["merged", "unloaded"])
def test_a_merged_model_computes_what_the_unmerged_one_does(
    family: Family, dtype: torch.dtype, in_place: bool, adapted: Callable[..., ia3.PeftModel]
) -> None:
    model, inputs = adapted(family, dtype), family.inputs()
    with torch.no_grad():
        unmerged = model(**inputs).logits.double()
        oracle = copy.deepcopy(model).double()(**inputs).logits
        if in_place:
            merged = model.merge_and_unload()
            assert not any("ia3_l" in name for name, _ in merged.named_modules())
        else:
            model.merge_adapter()
            merged = model
        logits = merged(**inputs).logits.double()
    # Merging rounds each scaled weight once more: u per product, as much as each of the unmerged model's roundings.
    # Their number is that of the layers' roundings, so the distance from fp64 stays within a small multiple.
    unit = torch.finfo(dtype).eps * float(oracle.norm())
    assert float((logits - oracle).norm()) <= 2 * float((unmerged - oracle).norm()) + unit


def test_disabling_a_merged_model_gives_the_base_model_exactly(
    family: Family, adapted: Callable[..., ia3.PeftModel]
) -> None:
    inputs, model = family.inputs(), adapted(family)
    base = family.build().requires_grad_(False)(**inputs).logits
    unmerged, before = model(**inputs).logits, _weights(model)
    model.merge_adapter()
    merged, weights = model(**inputs).logits, _weights(model)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base)
        _assert_unchanged(model, before)
    _assert_unchanged(model, weights)
    assert torch.equal(model(**inputs).logits, merged)
    assert all(layer.merged for _, layer in model.base_model.scaled_layers())
    model.unmerge_adapter()
    assert torch.equal(model(**inputs).logits, unmerged)


def test_several_adapters_merge_together_one_by_one_and_by_name() -> None:
    together, one_by_one, named = (_one_layer(ia3, "linear", False, torch.bfloat16, adapters=3) for _ in range(3))
    vectors = together.get_base_model().layer.ia3_l
    exact = _base(together).weight.detach().float() * vectors["default"] * vectors["a2"]
    before = _weights(named)
    together.base_model.set_adapter(["default", "a2"])
    together.merge_adapter()
    one_by_one.merge_adapter(["default"])
    one_by_one.merge_adapter(["a2"])
    named.merge_adapter(adapter_names=["default", "a2"])
    for model in (together, one_by_one, named):
        layer = model.get_base_model().layer
        assert layer.merged_adapters == ["default", "a2"]
        assert layer.merged
        # The product of all is rounded once, however it came about.
        assert torch.equal(_base(model).weight, _base(together).weight)
        torch.testing.assert_close(_base(model).weight.float(), exact, rtol=0.51 * 2**-7, atol=1e-30)
    named.unmerge_adapter()
    _assert_unchanged(named, before)
    assert named.get_base_model().layer.merged_adapters == []


def test_merging_some_and_unloading_others() -> None:
    model = _one_layer(ia3, "linear", True, adapters=3)
    vectors = {name: vector.detach().clone() for name, vector in model.get_base_model().layer.ia3_l.items()}
    weight = _base(model).weight.detach().clone()
    model.merge_adapter(["a1"])
    merged = model.merge_and_unload(adapter_names=["a1", "a2"], safe_merge=True)
    torch.testing.assert_close(merged.layer.weight, weight * vectors["a1"] * vectors["a2"])
    nothing = _one_layer(ia3, "linear", True)
    weight = _base(nothing).weight.detach().clone()
    assert torch.equal(nothing.merge_and_unload(adapter_names=[]).layer.weight, weight)


def test_merging_again_and_unmerging_nothing_are_told_in_the_words_of_peft() -> None:
    model = _one_layer(ia3, "linear", False)
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
        model.unmerge_adapter()
    model.merge_adapter()
    weights = _weights(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    _assert_unchanged(model, weights)
    with pytest.raises(ValueError, match=r"'default'.* while they are merged"):
        model.delete_adapter("default")
    with pytest.raises(ia3.IA3Error, match="no adapter 'nobody'"):
        model.merge_adapter(["nobody"])
    _assert_unchanged(model, weights)


def test_activating_another_adapter_unmerges_first(
    families: dict[str, Family], adapted: Callable[..., ia3.PeftModel]
) -> None:
    family = families["llama"]
    model, inputs = adapted(family), family.inputs()
    model.add_adapter("other", ia3.IA3Config())
    before = _weights(model)
    base = model(**inputs).logits
    model.set_adapter("other")
    expected = model(**inputs).logits
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert torch.equal(model(**inputs).logits, expected)
    assert not torch.equal(expected, base)
    _assert_unchanged(model, before)


def test_a_merged_model_is_saved_copied_moved_and_loaded_into(
    families: dict[str, Family], adapted: Callable[..., ia3.PeftModel], tmp_path: Path
) -> None:
    family = families["gpt2"]
    model, inputs = adapted(family), family.inputs()
    before = _weights(model)
    model.save_pretrained(tmp_path / "unmerged")
    model.merge_adapter()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "merged")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("unmerged", "merged")]
    assert files[0] == files[1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).logits, expected)
        twin.unmerge_adapter()
        _assert_unchanged(twin, before)
        with torch.no_grad():
            twin.get_base_model().transformer.h[0].attn.c_attn.base_layer.weight.zero_()
    model.bfloat16().unmerge_adapter()  # what is set aside moves along
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    _assert_unchanged(model, {name: value.bfloat16() for name, value in before.items()})


# --- in place, and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_folding_and_unfolding_with_vectors_that_change_leaves_every_bit(
    dtype: torch.dtype, families: dict[str, Family], adapted: Callable[..., ia3.PeftModel]
) -> None:
    model = adapted(families["gpt2"], dtype)
    vectors = [parameter for name, parameter in model.named_parameters() if "ia3_l" in name]
    base = {name: value for name, value in _weights(model).items() if "ia3_l" not in name}
    for step in range(30):
        model.merge_adapter()
        with torch.no_grad():
            for vector in vectors:  # as an optimizer does, while the old ones are in the weights
                vector.add_(0.1 * torch.randn_like(vector))
                vector.view(-1)[step % vector.numel()] = (0.0, 1e-30, -2.0)[step % 3]
        model.unmerge_adapter()
    _assert_unchanged(model, base | {name: value for name, value in _weights(model).items() if "ia3_l" in name})


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
def test_swapping_gives_the_bits_of_unmerging_and_merging(kind: str, is_feedforward: bool) -> None:
    swapped, fresh = (_one_layer(ia3, kind, is_feedforward, torch.bfloat16, adapters=3) for _ in range(2))
    before = _weights(swapped)
    swapped.merge_adapter()
    for old, new in [("default", "a2"), ("a2", "a1"), ("a1", "default"), ("default", "default"), ("default", "a1")]:
        swapped.swap_adapter(old, new)
        fresh.set_adapter(new)
        fresh.merge_adapter()
        _assert_unchanged(swapped, _weights(fresh))
        fresh.unmerge_adapter()
        assert swapped.active_adapters == swapped.get_base_model().layer.merged_adapters == [new]
    swapped.unmerge_adapter()
    _assert_unchanged(swapped, before)


def test_swapping_reaches_the_layers_of_both_adapters_and_the_heads(
    families: dict[str, Family], adapted: Callable[..., ia3.PeftModel]
) -> None:
    family = families["bert"]
    model, inputs = adapted(family), family.inputs()
    model.add_adapter("other", ia3.IA3Config(task_type="SEQ_CLS", target_modules=["query", "value"],
                                             feedforward_modules=[]))  # fmt: skip
    perturb(model, 8)
    before = _weights(model)
    model.set_adapter("other")
    expected = model(**inputs).logits
    model.set_adapter("default")
    model.merge_adapter()
    model.swap_adapter("default", "other")
    torch.testing.assert_close(model(**inputs).logits, expected)
    layers = dict(model.base_model.scaled_layers())
    assert {path: layer.merged_adapters for path, layer in layers.items()} == {
        path: ["other"] * ("query" in path or "value" in path) for path in layers
    }
    model.unmerge_adapter()
    _assert_unchanged(model, before)
    assert torch.equal(model(**inputs).logits, expected)


def test_swapping_one_of_several(families: dict[str, Family]) -> None:
    swapped, fresh = (_one_layer(ia3, "linear", False, adapters=3) for _ in range(2))
    swapped.base_model.set_adapter(["default", "a1"])
    swapped.merge_adapter()
    swapped.swap_adapter("default", "a2")
    assert swapped.get_base_model().layer.merged_adapters == ["a1", "a2"]
    assert swapped.active_adapters == ["a2", "a1"]
    fresh.merge_adapter(["a1", "a2"])
    _assert_unchanged(swapped, _weights(fresh))
    with pytest.raises(ia3.IA3Error, match="adapter 'default' is not merged into any layer"):
        swapped.swap_adapter("default", "a1")
    with pytest.raises(ia3.IA3Error, match="no adapter 'nobody'"):
        swapped.swap_adapter("a1", "nobody")
    _assert_unchanged(swapped, _weights(fresh))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_undoing_keeps_is_one_bit_a_weight_and_merging_makes_no_copy(dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096)).to(dtype)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.02)
    model = ia3.get_peft_model(base, ia3.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    with torch.no_grad():
        for _, layer in model.base_model.scaled_layers():
            layer.ia3_l["default"].normal_(1, 0.2)
    held_bytes = 2 * 4096 * 4096 // 8 + 4096 // 8
    status = Path("/proc/self/status")

    def resident(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1]) << 10

    model.merge_adapter()  # threads and their workspaces, once
    model.unmerge_adapter()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset here")
    before = resident("VmRSS")
    model.merge_adapter(safe_merge=True)
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    # Twice: the new residual of a layer is made before the old one goes.
    assert resident("VmHWM") - before < 2 * held_bytes + (2 << 20)
    residuals = [
        p.residual for _, layer in model.base_model.scaled_layers() for p in layer._merge_state.parameters.values()
    ]
    assert sum(residual.nbytes for residual in residuals) == held_bytes


def test_merging_inexactly_keeps_nothing_and_says_so() -> None:
    exact, inexact = (_one_layer(ia3, "linear", False, torch.bfloat16, adapters=2) for _ in range(2))
    exact.merge_adapter()
    inexact.merge_adapter(exact=False, safe_merge=True)
    merged = _weights(exact)
    _assert_unchanged(inexact, merged)
    assert all(
        parameter.residual is None for parameter in inexact.get_base_model().layer._merge_state.parameters.values()
    )
    for operation in (
        inexact.unmerge_adapter,
        lambda: inexact.swap_adapter("default", "a1"),
        lambda: inexact.merge_adapter(["a1"]),
        lambda: inexact.base_model.disable_adapter_layers(),
        lambda: inexact.merge_and_unload(adapter_names=["a1"]),
    ):
        with pytest.raises(
            ia3.IA3Error, match=r"default was merged into 'layer' with exact=False.*load the base model"
        ):
            operation()
        _assert_unchanged(inexact, merged)
        assert inexact.get_base_model().layer.merged_adapters == ["default"]
        assert not inexact.get_base_model().layer.disable_adapters
    assert torch.equal(inexact.merge_and_unload().layer.weight, merged["base_model.model.layer.base_layer.weight"])


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_merged_under_one_mode_and_unmerged_under_another(
    grad_mode: Any, families: dict[str, Family], adapted: Callable[..., ia3.PeftModel]
) -> None:
    model = adapted(families["llama"])
    model.add_adapter("other", ia3.IA3Config())
    before = _weights(model)
    with grad_mode():
        model.merge_adapter()
    model.swap_adapter("default", "other")
    with grad_mode():
        model.swap_adapter("other", "default")
    model.unmerge_adapter()
    _assert_unchanged(model, before)


@pytest.mark.parametrize("is_disabled", [False, True])
def test_a_merged_layer_is_converted_and_laid_out_anew(is_disabled: bool) -> None:
    model = _one_layer(ia3, "grouped conv2d", True)
    before = _weights(model)
    model.merge_adapter()
    merged = _weights(model)
    if is_disabled:
        model.base_model.disable_adapter_layers()
    model.to(memory_format=torch.channels_last)
    if is_disabled:
        _assert_unchanged(model, before)
        model.base_model.enable_adapter_layers()
    _assert_unchanged(model, merged)
    assert not _base(model).weight.is_contiguous()
    model.double()
    vector = model.get_base_model().layer.ia3_l["default"]
    expected = _formula("grouped conv2d", True, _base(_one_layer(ia3, "grouped conv2d", True)), vector)
    assert torch.equal(_base(model).weight, expected[0])
    model.float().unmerge_adapter()
    _assert_unchanged(model, before)
    model.merge_adapter()
    assert not model.to("meta").get_base_model().layer.merged  # the weights are gone, and what they held
