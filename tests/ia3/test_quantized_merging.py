"""Vectors in the scales of quantized weights: the codes stay, the values are scaled, and everything comes back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ia3
from ia3.merging import formats, quantized
from ia3.merging.formats import bitsandbytes as bnb_format
from ia3.merging.formats import gguf as gguf_format
from ia3.mlp import UpProjection, up_projections

from .quantizing import BF16, IN, KINDS, OUT, gguf_layer, linear

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
    """A copy of all that an object holds, which is equal to another only if it is so bit by bit."""
    if isinstance(value, Tensor):
        if hasattr(value, "qdata"):
            return [_bits(getattr(value, name)) for name in ("qdata", "scale", "zero_point", "block_size")]
        return str(value.dtype), value.shape, bytes(value.detach().reshape(-1).view(torch.uint8).tolist())
    if type(value).__name__ == "QuantState":
        return {name: _bits(field) for name, field in vars(value).items()}
    return value


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that the layers of a model hold, bit by bit, scales outside of parameters included."""
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
        known.write(cleared, {"scales": torch.zeros_like(known.read(cleared)["scales"])})  # type: ignore[union-attr]
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
        known = gguf_format.GgufBlocks()
        cleared = known.read(layer)["scales"]  # [out, fields, blocks, 1]
        without_minimum = copy.deepcopy(layer)
        cleared[:, 1:] = 0
        known.write(without_minimum, {"scales": cleared})
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
