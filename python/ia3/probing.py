"""What a layer is, where a model has which, and what a class computes, tried on numbers where names cannot tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.ia3.layer import IA3Layer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
# Packed linear layers that do not inherit from nn.Linear; by name, because they come with optional packages.
_LINEAR_LIKE = frozenset({"GgufLinear"})
# Layers whose weights their parents read, and which they never call, at least not always: by the parent's class.
# Mamba's kinds give weights to a kernel that trains on GPUs, the next layers' as well.
_MAMBA = ("dt_proj", "x_proj", "out_proj")
_ATTENTION_MAP = ("k_proj",)
_READ_BY_PARENT = {
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "DetrMHAttentionMap": _ATTENTION_MAP,
    "ConditionalDetrMHAttentionMap": _ATTENTION_MAP,
    "MaskFormerDetrMHAttentionMap": _ATTENTION_MAP,
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "LongcatFlashTopkRouter": ("classifier",),
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
}
# Layers that their parents slice where the model's configuration says so.
_SLICED_BY_PARENT = {"BloomAttention": ("dense",), "BloomMLP": ("dense_4h_to_h",)}


def is_scaled(module: nn.Module | None) -> bool:
    """Return whether ``module`` is a layer with vectors."""
    return module is not None and "ia3_l" in module._modules


def features(layer: Any) -> tuple[int, int] | None:
    """Return the input and output features (channels) of a layer that vectors can scale, else ``None``.

    Linear layers of any weight type, ``Conv1D``, ``Conv2d`` and ``Conv3d``. A subclass of ``nn.Linear`` that computes
    something else (a router, which returns a tuple) is none.
    """
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels, layer.out_channels
    if type(layer).__name__ in _LINEAR_LIKE or (
        isinstance(layer, nn.Linear) and what_linear_computes(layer) != "other"
    ):
        return layer.in_features, layer.out_features
    return None


def base_of(module: Any) -> nn.Module:
    """Return the layer inside of a scaled one, or the module itself."""
    base: nn.Module = module.base_layer if is_scaled(module) else module
    return base


def named_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return ``model.named_modules()`` without the inside of layers and heads that already carry adapters."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        yield path, module
        if isinstance(module, IA3Layer | ModulesToSaveWrapper):
            inside += (path + ".",)


def carriers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules of ``model`` that carry adapters, scaled layers and modules trained whole, by name."""
    for path, module in model.named_modules():
        if isinstance(module, IA3Layer | ModulesToSaveWrapper):
            yield path, module


def model_type(model: nn.Module) -> str | None:
    """Return the ``model_type`` of a transformers model's configuration, or ``None``."""
    return getattr(getattr(model, "config", None), "model_type", None)


def reader_of(model: nn.Module, path: str) -> str | None:
    """Return the class of the parent that reads the weight of the layer of this name without calling it, or None."""
    outer, _, name = path.rpartition(".")
    parent: Any = model.get_submodule(outer)
    is_sliced = getattr(parent, "slow_but_exact", False) and getattr(parent, "pretraining_tp", 1) > 1
    for kind in (entry.__name__ for entry in type(parent).__mro__):
        if name in _READ_BY_PARENT.get(kind, ()) or (is_sliced and name in _SLICED_BY_PARENT.get(kind, ())):
            return kind
    return None


def numbers(*shape: int, shift: int = 0) -> Tensor:
    """Return fp64 numbers between -1 and 1 in this shape, the same ones each time."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64, device="cpu") + shift).view(shape)


def what_linear_computes(layer: nn.Linear) -> str | None:
    """Return what the class's ``forward`` of an ``nn.Linear`` or a subclass computes.

    ``linear``: ``x Wᵀ + b``; ``features``: something else of that shape; ``other``: anything else (a router's tuple).
    ``None`` where it cannot be told: the class wants more than a weight and a bias (quantized layers do).
    """
    kind = type(layer)
    if kind.forward is nn.Linear.forward:
        return "linear"
    if type(layer._parameters.get("weight")) is not nn.Parameter:
        return None
    return _try_linear(kind, layer)


def _try_linear(kind: Any, layer: nn.Linear) -> str | None:
    inputs, outputs = 5, 12
    clone = kind.__new__(kind)
    nn.Module.__init__(clone)
    own = {name: value for name, value in vars(layer).items() if name not in vars(clone) and name != "forward"}
    clone.__dict__.update(own, in_features=inputs, out_features=outputs, training=False)
    weight, x = numbers(outputs, inputs), numbers(2, inputs, shift=70)
    bias = None if layer._parameters.get("bias") is None else numbers(outputs, shift=140)
    clone._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    clone._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    try:
        with torch.no_grad():
            y = kind.forward(clone, x)
    except Exception:  # it needs what this clone lacks
        return None
    expected = F.linear(x, weight, bias)
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return "other"
    return "linear" if torch.allclose(y.to(expected), expected) else "features"
