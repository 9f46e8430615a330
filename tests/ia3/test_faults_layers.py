"""Layers that are not quite linear layers, or not called as one, against PEFT and plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ia3
from ia3 import IA3Error

from .conftest import BY_NAME, MORE_FAMILIES, perturb
from .helpers import scaled_layer

ALL_FAMILIES = BY_NAME | {family.name: family for family in MORE_FAMILIES}


def of_peft(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Return a copy of an accelerated model that PEFT computes, without any of this package's code."""
    return ia3.decelerate(copy.deepcopy(model)).to(dtype)


def assert_near(result: Tensor, oracle: Tensor) -> None:
    """fp32 against fp64: a few roundings of the largest value, however deep the model is."""
    assert (result.double() - oracle).abs().max() <= 1e-5 * oracle.abs().max()


# --- one adapter in the weights, another in the computation ----------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv1d": (lambda: Conv1D(4, 6), (3, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (2, 6, 3, 3, 3)),
}


@pytest.mark.parametrize("merged", ["A", "B"])
@pytest.mark.parametrize("is_feedforward", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_of_two_active_adapters_the_one_that_is_not_merged_acts_and_is_trained(
    kind: str, is_feedforward: bool, merged: str
) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = scaled_layer(make(), is_feedforward, ("A", "B"))
    oracle = of_peft(layer)
    x = torch.randn(shape)
    other = "B" if merged == "A" else "A"
    expected = oracle(x.double())
    expected.square().sum().backward()

    layer.merge(adapter_names=[merged])
    layer.ia3_l[merged].requires_grad_(False)
    result = layer(x)
    result.square().sum().backward()

    assert_near(result, expected)
    assert_near(layer.ia3_l[other].grad, oracle.ia3_l[other].grad)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5_gated"])
def test_in_every_layer_of_a_model_one_adapter_is_merged_and_one_acts(name: str, adapted: Any) -> None:
    family = BY_NAME[name]
    model = adapted(family)
    model.add_adapter("A", ia3.IA3Config(**family.targets))  # without a task: of two heads none could be chosen
    perturb(model, seed=6)
    model.base_model.set_adapter(["default", "A"])
    inputs = {key: value for key, value in family.inputs().items() if key != "labels"}
    if family.task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        unmerged = model(**inputs).logits
        for merged in (["default"], ["A"]):
            model.merge_adapter(merged)
            torch.testing.assert_close(model(**inputs).logits, unmerged, rtol=1e-4, atol=1e-5)
            model.unmerge_adapter()


def test_merging_an_adapter_that_is_not_active_leaves_the_active_one_acting(adapted: Any) -> None:
    family = BY_NAME["llama"]
    model = adapted(family)
    model.add_adapter("A", ia3.IA3Config(task_type=family.task))
    perturb(model, seed=6)
    ids = family.inputs()["input_ids"]
    model.base_model.set_adapter(["default", "A"])
    with torch.no_grad():
        both = model(input_ids=ids).logits
        model.set_adapter("default")
        alone = model(input_ids=ids).logits
        model.merge_adapter(["A"])
        torch.testing.assert_close(model(input_ids=ids).logits, both, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=ids).logits, alone)


# --- layers that their parents do not call ---------------------------------------------------------------------------


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)


def _bloom() -> nn.Module:
    return ALL_FAMILIES["bloom"].build(slow_but_exact=True, pretraining_tp=2)


def _mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=32, state_size=4, time_step_rank=4)
    )


def _mamba2() -> nn.Module:
    config = transformers.Mamba2Config(
        hidden_size=8, num_hidden_layers=1, vocab_size=32, state_size=4, head_dim=4, num_heads=4, n_groups=1
    )
    return transformers.Mamba2ForCausalLM(config)


def _wavlm() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return transformers.WavLMModel(transformers.WavLMConfig(**sizes, **convolutions, **positions))


def _detr_map() -> nn.Module:
    from transformers.models.detr.modeling_detr import DetrMHAttentionMap

    return nn.ModuleDict({"map": DetrMHAttentionMap(8, 2, 0.0)})


UNCALLED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "torch's encoder": (_encoder, "linear1", "TransformerEncoderLayer"),
    "torch's encoder, second": (_encoder, "linear2", "TransformerEncoderLayer"),
    "torch's attention": (_encoder, "out_proj", "MultiheadAttention"),
    "Bloom": (_bloom, "dense", "BloomAttention"),
    "Bloom's block": (_bloom, "dense_4h_to_h", "BloomMLP"),
    "Mamba": (_mamba, "dt_proj", "MambaMixer"),
    "Mamba's kernel": (_mamba, "x_proj", "MambaMixer"),
    "Mamba 2's kernel": (_mamba2, "out_proj", "Mamba2Mixer"),
    "WavLM": (_wavlm, "v_proj", "WavLMAttention"),
    "DETR": (_detr_map, "k_proj", "DetrMHAttentionMap"),
}


@pytest.mark.parametrize("case", UNCALLED)
def test_a_layer_whose_weight_its_parent_reads_is_refused_by_name_and_left_out_of_all_linear(case: str) -> None:
    make, name, parent = UNCALLED[case]
    model = make()
    before = [(path, type(module)) for path, module in model.named_modules()]
    with pytest.raises(IA3Error, match=f"{name}.* whose weight the {parent}"):
        ia3.get_peft_model(model, ia3.IA3Config(target_modules=[name], feedforward_modules=[]))
    assert [(path, type(module)) for path, module in model.named_modules()] == before

    if not case.startswith(("torch", "DETR")):  # which have no others
        wrapped = ia3.get_peft_model(model, ia3.IA3Config(target_modules="all-linear", feedforward_modules=[]))
        scaled = {row.module.rpartition(".")[2] for row in ia3.report(wrapped).rows}
        assert scaled
        assert name not in scaled


def test_a_model_of_such_layers_only_has_nothing_for_all_linear() -> None:
    with pytest.raises(IA3Error, match=r"all-linear.* no linear layer"):
        ia3.get_peft_model(_encoder(), ia3.IA3Config(target_modules="all-linear", feedforward_modules=[]))


@pytest.mark.parametrize("name", ["bloom", "deberta", "t5"])
def test_a_weight_that_is_only_looked_at_does_not_stop_an_adapter(name: str) -> None:
    """Bloom slices where it is told to only, and T5 reads a dtype: their default targets stay what they are."""
    family = ALL_FAMILIES[name]
    model = ia3.get_peft_model(family.build(), ia3.IA3Config(task_type=family.task))
    assert ia3.report(model).rows


# --- one layer at two places -----------------------------------------------------------------------------------------


class _Twice(nn.Module):
    """Use one linear layer under two names, of which one is a target."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleDict({"proj": nn.Linear(6, 6)})
        self.right = nn.ModuleDict({"other": self.left["proj"]})

    def forward(self, x: Tensor) -> Tensor:
        return self.right["other"](torch.tanh(self.left["proj"](x)))


@pytest.mark.parametrize("is_feedforward", [False, True])
def test_a_layer_at_two_places_is_scaled_and_merged_at_one(is_feedforward: bool) -> None:
    torch.manual_seed(0)
    base = _Twice()
    plain, x = copy.deepcopy(base).double(), torch.randn(3, 6)
    config = {"target_modules": ["left.proj"], "feedforward_modules": ["left.proj"] if is_feedforward else []}
    model = ia3.get_peft_model(base, ia3.IA3Config(**config))
    perturb(model)
    scale = base.left["proj"].ia3_l["default"].detach().double().reshape(-1)
    wide, inner = x.double(), plain.left["proj"]
    expected = plain.right["other"](torch.tanh(inner(wide * scale) if is_feedforward else inner(wide) * scale))

    assert_near(model(x), expected)
    model.merge_adapter()
    assert_near(model(x), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_near(model(x), plain(wide))
    assert_near(model.merge_and_unload()(x), expected)


def test_two_places_are_one_layer_again_after_unloading() -> None:
    base = _Twice()
    layer = base.left["proj"]
    model = ia3.get_peft_model(base, ia3.IA3Config(target_modules=["left.proj"], feedforward_modules=[]))
    unloaded = model.unload()
    assert unloaded.left["proj"].weight is unloaded.right["other"].weight is layer.weight


# --- subclasses of linear layers -------------------------------------------------------------------------------------


class _Standardised(nn.Conv2d):
    """Change the weight in forward, so that scaling it is undone again."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class _Padded(nn.Conv2d):
    """Compute what the class above it does."""

    def extra_repr(self) -> str:
        return "padded, " + super().extra_repr()


class _Normalised(nn.Linear):
    """Divide the rows of the weight by their norms."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class _Clamped(nn.Linear):
    """Do something behind the product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=0.1)


def test_falcon_merges_exactly() -> None:
    family = ALL_FAMILIES["falcon"]
    model = ia3.get_peft_model(family.build(), ia3.IA3Config(task_type="CAUSAL_LM")).eval()
    perturb(model)
    ids = family.inputs()["input_ids"]
    with torch.no_grad():
        oracle = of_peft(model)(input_ids=ids).logits
        before = model(input_ids=ids).logits
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        model.merge_adapter()
        assert_near(model(input_ids=ids).logits, oracle)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=ids).logits, before)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert_near(model.merge_and_unload()(input_ids=ids).logits, oracle)


@pytest.mark.parametrize("kind", [_Standardised, _Normalised, _Clamped])
@pytest.mark.parametrize("is_feedforward", [False, True])
def test_a_layer_that_computes_its_weight_runs_and_is_not_merged(kind: Any, is_feedforward: bool) -> None:
    torch.manual_seed(0)
    base = kind(6, 4, 3) if issubclass(kind, nn.Conv2d) else kind(6, 4)
    x = torch.randn(2, 6, 5, 5) if issubclass(kind, nn.Conv2d) else torch.randn(2, 6)
    plain = copy.deepcopy(base).double()
    layer = scaled_layer(base, is_feedforward)
    scale = layer.ia3_l["default"].detach().double()
    scale = scale if x.dim() == 4 else scale.reshape(-1)
    expected = plain(x.double() * scale) if is_feedforward else plain(x.double()) * scale
    assert_near(layer(x), expected)
    with pytest.raises(IA3Error, match="cannot merge"):
        layer.merge()
    assert not layer.merged
    assert_near(layer(x), expected)


def test_a_convolution_that_is_one_but_for_its_class_merges() -> None:
    torch.manual_seed(0)
    layer = scaled_layer(_Padded(6, 4, 3), False)
    x = torch.randn(2, 6, 5, 5)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


# --- outputs that somebody writes to ---------------------------------------------------------------------------------


class _Written(nn.Module):
    """Write over the output of a scaled layer, as ``inplace=True`` does."""

    def __init__(self, base: nn.Module, how: str) -> None:
        super().__init__()
        self.proj, self.how = base, how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        if self.how == "relu":
            return F.relu(y, inplace=True)
        if self.how == "add":
            y += 0.5
        elif self.how == "multiply":
            y *= 3
        elif self.how == "dropout":
            y = F.dropout(y, 0.5, inplace=True)
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains_weight", [False, True])
@pytest.mark.parametrize("is_feedforward", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("how", ["relu", "add", "multiply", "dropout"])
def test_an_output_may_be_written_over_in_training(
    how: str, kind: str, is_feedforward: bool, trains_weight: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = scaled_layer(make().to(dtype), is_feedforward)
    layer.base_layer.weight.requires_grad_(trains_weight)
    model, x = _Written(layer, how), torch.randn(shape, dtype=dtype, requires_grad=True)
    theirs = ia3.decelerate(copy.deepcopy(model)).double()
    wide = x.detach().double().requires_grad_()

    torch.manual_seed(1)
    model(x).square().sum().backward()
    torch.manual_seed(1)
    theirs(wide).square().sum().backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    pairs = [(x.grad, wide.grad), (layer.ia3_l["default"].grad, theirs.proj.ia3_l["default"].grad)]
    if trains_weight:
        pairs.append((layer.base_layer.weight.grad, theirs.proj.base_layer.weight.grad))
    for mine, right in pairs:
        assert (mine.double() - right).abs().max() <= tolerance * right.abs().max()
