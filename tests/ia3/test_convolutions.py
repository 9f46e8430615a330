"""Convolutions with vectors: one element a channel, on either side, for every layout, against the formula and PEFT."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ia3

from .conftest import perturb
from .helpers import scaled_layer

KINDS: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "conv2d 1x1 without bias": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "conv2d strided, padded": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv2d dilated, reflecting": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
    "conv2d in groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv2d depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "conv3d strided, padded": lambda: nn.Conv3d(4, 6, (1, 2, 2), stride=(1, 2, 1), padding=1),
    "conv3d in groups": lambda: nn.Conv3d(4, 6, 2, groups=2),
}
LAYOUTS = ["contiguous", "channels last", "unbatched", "unbatched, channels last", "strided"]
every_kind = pytest.mark.parametrize("kind", KINDS)
both_sides = pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])


def _layer(kind: str, is_feedforward: bool, dtype: torch.dtype = torch.float32, adapters: int = 1) -> Any:
    torch.manual_seed(0)
    layer = scaled_layer(KINDS[kind]().to(dtype), is_feedforward, [f"a{index}" for index in range(adapters)])
    layer.requires_grad_(True)
    with torch.no_grad():
        layer.ia3_l["a0"].view(-1)[1] = 0.0
    return layer


def _input(layer: Any, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    spatial = layer.base_layer.weight.dim() - 2
    shape = (2, layer.in_features, *(6, 7, 5)[:spatial])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    if "channels last" in layout:
        x = x.to(memory_format=torch.channels_last if spatial == 2 else torch.channels_last_3d)
    if "unbatched" in layout:
        x = x[0]
    if layout == "strided":
        x = torch.cat([x, x], dim=-1)[..., ::2]
    return x.requires_grad_()


def _formula(layer: Any, x: Tensor) -> Tensor:
    """In the dtype of ``x``: base(x ∘ l) or base(x) ∘ l."""
    scale = torch.ones((), dtype=x.dtype)
    for name in layer.active_adapters:
        scale = scale * layer.ia3_l[name].to(x.dtype).reshape(-1, *(1,) * (layer.base_layer.weight.dim() - 2))
    y: Tensor = layer.base_layer(x * scale) if layer.is_feedforward else layer.base_layer(x) * scale
    return y


def _run(function: Callable[[Tensor], Tensor], layer: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients for x, the vectors and the base layer."""
    wanted = [x, *layer.parameters()]
    y = function(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, direction)]


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@both_sides
@every_kind
def test_results_and_gradients_are_those_of_the_formula(
    kind: str, is_feedforward: bool, layout: str, adapters: int
) -> None:
    layer = _layer(kind, is_feedforward, adapters=adapters)
    channels = 4 if is_feedforward else layer.out_features
    assert layer.ia3_l["a0"].shape == (1, channels, *(1,) * (layer.base_layer.weight.dim() - 2))
    x = _input(layer, layout)
    expected = _run(lambda x: _formula(layer, x), layer, x)
    for ours, theirs in zip(_run(layer, layer, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    if layout == "channels last":
        own = layer.base_layer(x)
        assert layer(x).stride() == own.stride()  # what comes after runs as it did


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@both_sides
@every_kind
def test_16_bits_are_as_exact_as_peft(kind: str, is_feedforward: bool, layout: str) -> None:
    layer = _layer(kind, is_feedforward, torch.bfloat16)
    x = _input(layer, layout, torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    oracle = _run(lambda x: _formula(exact, x), exact, x.detach().double().requires_grad_())
    theirs = _peft_twin(layer)
    results = [_run(function, layer, x) for function in (layer, theirs)]
    for ours, of_peft, true in zip(*results, oracle, strict=True):
        assert ours.dtype == of_peft.dtype
        # PEFT's own distance from fp64 is what rounding does here; twice that allows for another order of the same.
        allowed = 2 * (of_peft.double() - true).norm() + torch.finfo(torch.bfloat16).eps * true.norm() * 2**-4
        assert float((ours.double() - true).norm()) <= float(allowed)


def _peft_twin(layer: Any) -> Callable[[Tensor], Tensor]:
    """PEFT's layer over the same parameters."""
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if layer.is_feedforward else [])
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.base_layer)), config, adapter_name="a0")
    twin: Any = model.base_model.model[0]
    twin.base_layer, twin.ia3_l = layer.base_layer, layer.ia3_l
    return twin  # type: ignore[no-any-return]


def test_autocast_scales_what_the_convolution_gives() -> None:
    for is_feedforward in (False, True):
        layer = _layer("conv2d", is_feedforward)
        x = _input(layer, "contiguous")
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = layer(x), _formula(layer, x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected.bfloat16(), rtol=2**-8, atol=0)  # at most one rounding apart


class Vision(nn.Module):
    """Patches, a grouped and a depthwise convolution, a volume, and a linear layer on top."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.mixer = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.volume = nn.Conv3d(4, 6, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.mixer(self.patches(x)).relu())
        x = self.volume(x.unflatten(1, (4, 3)))
        y: Tensor = self.head(x.mean((2, 3, 4)))
        return y


TARGETS: dict[str, Any] = {
    "target_modules": ["patches", "mixer", "depthwise", "volume", "head"],
    "feedforward_modules": ["mixer", "volume"],
}


def _vision(library: Any, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    model = library.get_peft_model(Vision(), library.IA3Config(**(TARGETS | arguments)))
    if "init_ia3_weights" not in arguments:
        perturb(model)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def test_a_model_of_convolutions_is_that_of_peft(images: Tensor) -> None:
    ours, theirs = _vision(ia3), _vision(peft)
    facts = [{(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert facts[0] == facts[1]
    gradients = []
    for model in (ours, theirs):
        model(images).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(ours(images), theirs(images))
    torch.testing.assert_close(gradients[0], gradients[1])
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(images), theirs(images))


def test_noise_is_that_of_peft() -> None:
    models = [dict(_vision(library, init_ia3_weights=False).named_parameters()) for library in (ia3, peft)]
    for name, parameter in models[0].items():
        assert torch.equal(parameter, models[1][name]), name


def test_files_go_both_ways(tmp_path: Path, images: Tensor) -> None:
    for source, target in ((ia3, peft), (peft, ia3)):
        folder = tmp_path / source.__name__
        model = _vision(source)
        model.save_pretrained(str(folder))
        torch.manual_seed(0)
        loaded: Any = target.PeftModel.from_pretrained(Vision(), str(folder)).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images))
        loaded.save_pretrained(str(folder / "again"))
        first, second = (load_file(f / "adapter_model.safetensors") for f in (folder, folder / "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_file_for_other_channels_is_refused(tmp_path: Path) -> None:
    _vision(ia3).save_pretrained(tmp_path)
    wider = Vision()
    wider.mixer = nn.Conv2d(16, 12, 3, padding=1, groups=2)
    with pytest.raises(ia3.IA3Error, match=r"mixer\.ia3_l.*\[1, 8, 1, 1\].*\[1, 16, 1, 1\]"):
        ia3.PeftModel.from_pretrained(wider, tmp_path)
    assert type(wider.mixer) is nn.Conv2d


def test_a_model_of_convolutions_merges_and_is_copied(images: Tensor) -> None:
    model = _vision(ia3)
    with torch.no_grad():
        expected = model(images)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(images), expected)
        model.merge_adapter()
        torch.testing.assert_close(model(images), expected)
        model.unmerge_adapter()
        assert torch.equal(model(images), expected)
        torch.testing.assert_close(model.merge_and_unload()(images), expected)


def test_all_linear_leaves_convolutions_alone_as_peft_does() -> None:
    for library in (ia3, peft):
        model = _vision(library, target_modules="all-linear", feedforward_modules=[])
        scaled = {name for name, _ in model.named_parameters() if "ia3_l" in name}
        assert scaled == {"base_model.model.head.ia3_l.default"}, library


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose2d])
def test_other_convolutions_are_refused(kind: Any) -> None:
    base = nn.Sequential(kind(4, 6, 3))
    with pytest.raises(ValueError, match=f"'0', which is a {kind.__name__}; only linear layers and two- and three-"):
        ia3.get_peft_model(base, ia3.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert type(base[0]) is kind
