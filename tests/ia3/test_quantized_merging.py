"""Vectors in the scales of quantized weights: the codes stay, the values are scaled, and everything comes back."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import ia3
from ia3.merging import formats, quantized
from ia3.merging.formats import bitsandbytes as bnb_format
from ia3.merging.formats import gguf as gguf_format
from ia3.mlp import UpProjection, up_projections

from .conftest import perturb
from .quantizing import BF16, IN, KINDS, OUT, dequantized_model, eager_model, gguf_layer, linear, loaded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

FP32_ROUNDING, FP16_ROUNDING = 2.0**-24, 2.0**-11
FP16_SMALLEST = 2.0**-24  # of fp16's subnormal numbers, so that rounding to one errs by half of it


# --- the layers -----------------------------------------------------------------------------------------------------


def _int8(after_forward: bool = False) -> Any:
    layer = KINDS["bnb 8-bit"](linear())[0]
    if after_forward:
        layer(torch.ones(1, IN, dtype=BF16))
    return layer


def _four_bit(nested: bool = False, kind: str = "nf4", storage: torch.dtype = torch.uint8) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    plain = linear()
    options = {"compress_statistics": nested, "quant_type": kind, "quant_storage": storage}
    layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=BF16, **options)
    layer.weight = bnb.nn.Params4bit(plain.weight.data.float(), requires_grad=False, module=layer, **options)
    layer.bias = nn.Parameter(plain.bias.data, requires_grad=False)
    return layer.to("cpu")


def _evaluated(layer: Any) -> Any:
    """After an evaluation, which on some CPUs changes the layout of a 4-bit weight."""
    layer.eval()(torch.ones(1, IN, dtype=BF16))
    if layer.support_avx512bf16_for_cpu:
        assert layer.weight.quant_state.packing_format_for_cpu
    return layer


def _torchao_groups() -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear())
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(16)))
    return model[0].requires_grad_(False)


LAYERS: dict[str, Callable[[], Any]] = {
    "int8": _int8,
    "int8 after a forward": lambda: _int8(after_forward=True),
    "nf4": _four_bit,
    "fp4": lambda: _four_bit(kind="fp4"),
    "nf4 nested": lambda: _four_bit(nested=True),
    "nf4 stored as bf16": lambda: _four_bit(nested=True, storage=BF16),
    "nf4 evaluated": lambda: _evaluated(_four_bit()),
    "nf4 nested evaluated": lambda: _evaluated(_four_bit(nested=True)),
    "torchao": lambda: KINDS["torchao int8"](linear())[0],
    "torchao groups": _torchao_groups,
    "Q4_0": lambda: _gguf("Q4_0"),
    "Q4_1": lambda: _gguf("Q4_1"),
    "Q8_0": lambda: _gguf("Q8_0"),
}


def _gguf(kind: str) -> Any:
    plain = linear()
    layer = gguf_layer(plain.weight, kind)
    layer.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)
    return layer


@pytest.fixture(params=LAYERS)
def base(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]()


def _adapted(base: nn.Module, is_feedforward: bool = False, adapters: int = 1) -> ia3.PeftModel:
    """A model of one layer, whose vectors have negative entries and a zero."""
    config = ia3.IA3Config(target_modules=["0"], feedforward_modules=["0"] if is_feedforward else [])
    model = ia3.get_peft_model(nn.Sequential(base), config)
    for index in range(1, adapters):
        model.add_adapter(f"a{index}", config)
    for index, (name, vector) in enumerate(
        (name, p) for name, p in model.named_parameters() if name.rpartition(".ia3_l.")[1]
    ):
        with torch.no_grad():
            vector.normal_(generator=torch.Generator().manual_seed(3 + index))
            vector.view(-1)[index] = 0.0
        assert name
    return model


def _vector(model: ia3.PeftModel, adapter: str = "default") -> Tensor:
    return model.base_model.scaled_layers()[0][1].ia3_l[adapter].detach().double().reshape(-1)


def _bits(value: Any) -> Any:
    """A copy of all that an object holds, which is equal to another only if it is so to the bit."""
    if isinstance(value, Tensor):
        if hasattr(value, "qdata"):
            return [_bits(getattr(value, name)) for name in ("qdata", "scale", "zero_point", "block_size")]
        return str(value.dtype), value.shape, bytes(value.detach().reshape(-1).view(torch.uint8).tolist())
    if type(value).__name__ == "QuantState":
        return {name: _bits(field) for name, field in vars(value).items()}
    return value


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that the layers of a model hold, to the bit, scales outside of parameters included."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, parameter in [*module._parameters.items(), *module._buffers.items()]:
            if parameter is not None:
                found[f"{path}.{name}"] = _bits(parameter)
                found[f"{path}.{name}.quant_state"] = _bits(getattr(parameter, "quant_state", None))
        if (
            type(module).__name__ == "Linear8bitLt" and "state" in module.__dict__
        ):  # PEFT's layers have the name as well
            scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            found[f"{path}.SCB"] = _bits(scales)
    return found


def _codes(layer: Any) -> Any:
    """The codes of a layer: all of its weight's bits that are not a scale, in the layout in which it was quantized."""
    if type(layer).__name__ == "Linear4bit":
        return _bits(bnb_format._flat_codes(layer).view(torch.uint8))
    if type(layer).__name__ == "GgufLinear":
        known = formats.format_of(layer)
        cleared = copy.deepcopy(layer)
        known.write(cleared, {"fields": torch.zeros_like(known.read(cleared)["fields"])})  # type: ignore[union-attr]
        return _bits(cleared.weight.data)
    return _bits(layer.weight.qdata if hasattr(layer.weight, "qdata") else layer.weight.data)


def _exact_values(layer: Any) -> tuple[Tensor, Tensor]:
    """The weight ``[out, in]`` in fp64, from codes and scales by definition; and the sum of its parts' magnitudes."""
    kind = type(layer).__name__
    if kind == "Linear8bitLt":
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        values = layer.weight.data.double() * scales.double()[:, None] / 127
    elif kind == "Linear4bit":
        state = layer.weight.quant_state
        codes = bnb_format._flat_codes(layer).view(torch.uint8).reshape(-1)
        levels = state.code.double()[torch.stack([codes >> 4, codes & 15], 1).long()].view(OUT, -1, state.blocksize)
        # Read by bitsandbytes: nested scales are defined by what it makes of them.
        known = bnb_format.FourBitBlocks()
        values = (levels * known.scales(known.read(layer)).double().view(OUT, -1, 1)).view(OUT, IN)
    elif kind == "GgufLinear":
        fields = gguf_format.GgufBlocks().read(layer)["fields"].double()[..., 0]  # [fields, out, blocks]
        without_minimum = copy.deepcopy(layer)
        if len(fields) > 1:
            format_ = gguf_format.GgufBlocks()
            cleared = format_.read(layer)["fields"].clone()
            cleared[1] = 0
            format_.write(without_minimum, {"fields": cleared})
        gguf = pytest.importorskip("gguf")
        number = gguf.GGMLQuantizationType(layer.ggml_type)
        values, main = (
            torch.from_numpy(gguf.quants.dequantize(part.weight.numpy(), number)).double()
            for part in (layer, without_minimum)
        )
        return values, main.abs() + (values - main).abs()
    else:
        weight = layer.weight
        scales = weight.scale.double().repeat_interleave(weight.block_size[1], 1)
        values = (
            weight.qdata.double() - weight.zero_point.double().repeat_interleave(weight.block_size[1], 1)
        ) * scales
    return values, values.abs()


def _scale_rounding(layer: Any) -> tuple[float, float]:
    """By how much the product of a scale and a vector is rounded: relative, and absolute for the smallest scales."""
    return (FP16_ROUNDING, FP16_SMALLEST / 2) if type(layer).__name__ == "GgufLinear" else (FP32_ROUNDING, 0.0)


# --- one layer ------------------------------------------------------------------------------------------------------


def test_scales_are_multiplied_codes_stay_and_everything_comes_back(base: Any) -> None:
    model = _adapted(base)
    before, codes, bias = _snapshot(model), _codes(base), base.bias.detach().double()
    values, magnitudes = _exact_values(base)
    model.merge_adapter(safe_merge=True)
    l = _vector(model)  # noqa: E741 the paper's name
    assert _codes(base) == codes
    relative, absolute = _scale_rounding(base)
    # One rounding of the scale; the fp64 arithmetic here has none to speak of. A GGUF code is at most 127.
    allowed = relative * magnitudes * l.abs()[:, None] * (1 + 2**-20) + 255 * absolute
    if type(base).__name__ == "GgufLinear":
        allowed += 2**-22 * magnitudes * l.abs()[:, None]  # the package computes in fp32
    assert bool(((_exact_values(base)[0] - values * l[:, None]).abs() <= allowed).all())
    assert torch.equal(base.bias, (bias * l).float().to(base.bias.dtype))
    assert _snapshot(model) != before
    model.unmerge_adapter()
    assert _snapshot(model) == before


def test_a_merged_layer_computes_what_it_did(base: Any) -> None:
    model = _adapted(base)
    x = torch.randn(9, IN, generator=torch.Generator().manual_seed(1)).to(BF16)
    with torch.no_grad():
        unmerged, own = model(x).double(), base(x).double()
        model.merge_adapter()
        merged = model(x).double()
    # Both round to bf16: the one the base's output and its product with l, the other one sum, and the bf16 scales or
    # values that bitsandbytes computes with on the way, each by half an epsilon of the magnitudes summed.
    values, _ = _exact_values(base)
    magnitudes = x.double().abs() @ values.abs().T + base.bias.double().abs() + (own * _vector(model)).abs()
    assert bool(((merged - unmerged).abs() <= 3 * torch.finfo(BF16).eps * magnitudes).all())
    assert not torch.equal(merged, own)


def test_several_adapters_multiply_and_are_swapped_from_the_scales_as_they_were(base: Any) -> None:
    model = _adapted(base, adapters=3)
    before = _snapshot(model)
    model.base_model.set_adapter(["default", "a1"])
    model.merge_adapter()
    both = _snapshot(model)
    model.unmerge_adapter()
    assert _snapshot(model) == before
    model.merge_adapter(["a1"])
    one = _snapshot(model)
    model.merge_adapter(["default"])
    assert _snapshot(model)["base_model.model.0.base_layer.bias"] == both["base_model.model.0.base_layer.bias"]
    model.unmerge_adapter()
    model.merge_adapter(["a2"])
    model.swap_adapter("a2", "a1")
    assert _snapshot(model) == one
    model.unmerge_adapter()
    assert _snapshot(model) == before


def test_an_evaluation_in_between_changes_nothing_that_unmerging_restores() -> None:
    """It moves the scales of int8 layers, and lays 4-bit weights out anew."""
    x = torch.ones(1, IN, dtype=BF16)
    for make in (_int8, _four_bit, lambda: _four_bit(nested=True), lambda: _four_bit(storage=BF16)):
        base: Any = make()
        model = _adapted(base).eval()
        before = _snapshot(model)
        model.merge_adapter()
        model(x)
        model.unmerge_adapter()
        assert _snapshot(model) == before


def test_nested_statistics_are_plain_while_merged() -> None:
    base = _four_bit(nested=True)
    model = _adapted(base)
    assert base.weight.quant_state.nested
    model.merge_adapter()
    state = base.weight.quant_state
    assert not state.nested
    assert state.state2 is None
    assert (state.absmax.dtype, state.absmax.numel()) == (torch.float32, OUT * IN // state.blocksize)
    restored = type(state).from_dict(state.as_dict(packed=True), torch.device("cpu"))
    assert torch.equal(restored.absmax, state.absmax)


def test_a_disabled_merged_layer_is_the_base_layer(base: Any) -> None:
    x = torch.randn(9, IN, generator=torch.Generator().manual_seed(1)).to(BF16)
    model = _adapted(base).train()
    with torch.no_grad():
        own = base(x)
        before = _snapshot(model)
        model.merge_adapter()
        merged, held = model(x), _snapshot(model)
        with model.disable_adapter():
            assert _snapshot(model) == before
            assert torch.equal(model(x), own)
        assert _snapshot(model) == held
        assert torch.equal(model(x), merged)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_a_merged_layer_are_unmerged_by_themselves(base: Any, duplicate: Callable[[Any], Any]) -> None:
    if hasattr(base.weight, "qdata") and duplicate is not copy.deepcopy:
        pytest.skip("torchao's own patch of such layers cannot be pickled")
    model = _adapted(base)
    before = _snapshot(model)
    model.merge_adapter()
    held, twin = _snapshot(model), duplicate(model)
    twin.unmerge_adapter()
    assert _snapshot(twin) == before
    assert _snapshot(model) == held
    model.unmerge_adapter()
    assert _snapshot(model) == before


def test_scales_that_overflow_are_not_merged_if_that_is_asked_for(base: Any) -> None:
    model = _adapted(base)
    with torch.no_grad():
        model.base_model.scaled_layers()[0][1].ia3_l["default"][3] = torch.inf
    before = _snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ia3.IA3Error, match=r"would give '0' a scale or a bias that is not finite.*nothing was merg"
        ):
            merge(safe_merge=True)
        assert _snapshot(model) == before


def test_sixteen_bit_scales_overflow_earlier() -> None:
    model = _adapted(_gguf("Q8_0"))
    with torch.no_grad():
        model.base_model.scaled_layers()[0][1].ia3_l["default"].fill_(1e9)
    with pytest.raises(ia3.IA3Error, match="not finite"):
        model.merge_adapter(safe_merge=True)


def test_scales_written_to_in_between_are_not_undone() -> None:
    for make in (_int8, _four_bit, LAYERS["torchao"], LAYERS["Q8_0"]):
        base: Any = make()
        model = _adapted(base)
        model.merge_adapter()
        known: Any = formats.format_of(base)
        state = known.read(base)
        known.write(base, known.scaled(base, state, torch.full((OUT,), 1.01)))
        with pytest.raises(ia3.IA3Error, match=r"the scales of '0' were written to while default was merged"):
            model.unmerge_adapter()


def test_interrupted_scaling_leaves_the_layer_as_it_was(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _adapted(base, adapters=2)
    for merged in ([], ["a1"]):
        if merged:
            model.merge_adapter(merged)
        before = _snapshot(model)
        with monkeypatch.context() as patch:
            patch.setattr(quantized, "_fingerprint", lambda scales: 1 / 0)  # after everything was written
            with pytest.raises(ZeroDivisionError):
                model.merge_adapter(["default"])
        assert _snapshot(model) == before
        assert model.base_model.scaled_layers()[0][1].merged_adapters == merged


@pytest.mark.parametrize(
    "kind",
    [*gguf_format._GGUF_FIELDS, "IQ1_M"],
)
def test_every_gguf_types_fields_are_its_scales_and_nothing_else(kind: str) -> None:
    """Whatever the other bytes are, powers of two in the vector give exactly that multiple of each value."""
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant")
    layers = pytest.importorskip("transformers.integrations.gguf.utils")
    (number,) = (number for number, name in dequant.GGML_NAME.items() if name == kind)
    layer = layers.GgufLinear(512, 8, number)
    layer.weight.data.random_(generator=torch.Generator().manual_seed(0))
    model = _adapted(layer)
    if kind == "IQ1_M":
        with pytest.raises(ia3.IA3Error, match=r"cannot merge into '0', .* type IQ1_M has no field .* run the model"):
            model.merge_adapter()
        return
    for start in gguf_format._GGUF_FIELDS[kind]:
        blocks = layer.weight.data.view(-1, dequant.GGML_BLOCK[number][1])
        fields = torch.rand(len(blocks), 1, generator=torch.Generator().manual_seed(start)).add(1).half()
        blocks[:, start : start + 2] = fields.view(torch.uint8)
    values, powers = dequant.dequantize(layer.weight.data, number).view(8, -1), 2.0 ** torch.arange(-4, 4)
    assert bool(values.any())
    with torch.no_grad():
        model.base_model.scaled_layers()[0][1].ia3_l["default"].copy_(powers[:, None])
    before = _snapshot(model)
    model.merge_adapter()
    assert torch.equal(dequant.dequantize(layer.weight.data, number).view(8, -1), values * powers[:, None])
    model.unmerge_adapter()
    assert _snapshot(model) == before


def test_no_type_that_transformers_packs_is_forgotten() -> None:
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant")
    assert set(gguf_format._GGUF_FIELDS) | {"IQ1_M"} == set(dequant.GGML_NAME.values())


# --- quantized anew -------------------------------------------------------------------------------------------------

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


# --- the up projection ----------------------------------------------------------------------------------------------

GATED = {"llama", "qwen2", "gemma", "mistral", "gemma2", "gemma3_text", "qwen3", "t5_gated", "phi3", "mt5"}


def test_scaling_the_up_projections_rows_is_scaling_the_down_projections_inputs(family: Any) -> None:
    model = ia3.get_peft_model(family.build().double(), ia3.IA3Config(task_type=family.task, **family.targets))
    base = model.unload()
    found = up_projections(base)
    paths = {id(module): path for path, module in base.named_modules()}
    reasons = [up for up in found.values() if isinstance(up, str)]
    assert all("has no gate, so that an activation stands between" in reason for reason in reasons)
    ups = {paths[down]: up for down, up in found.items() if isinstance(up, UpProjection)}
    assert bool(ups) == (family.name in GATED)
    twin = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, up in ups.items():
            down = base.get_submodule(path)
            scale = torch.randn(down.in_features, generator=generator, dtype=torch.double)
            down.weight.mul_(scale)
            twin.get_submodule(up.path).weight[up.start :].mul_(scale[:, None])
            bias = twin.get_submodule(up.path).bias
            if bias is not None:
                bias[up.start :].mul_(scale)
        torch.testing.assert_close(base(**family.inputs()).logits, twin(**family.inputs()).logits)


def test_a_block_whose_forward_was_replaced_takes_no_vector_for_another(families: dict[str, Any]) -> None:
    base = families["llama"].build()
    block = base.model.layers[0].mlp
    assert isinstance(up_projections(base)[id(block.down_proj)], UpProjection)
    block.forward = lambda x: x
    reason = up_projections(base)[id(block.down_proj)]
    assert reason == "the forward of the LlamaMLP 'model.layers.0.mlp' was replaced, and may compute something else"


# --- whole models ---------------------------------------------------------------------------------------------------


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
