"""Quantized layers and models, made on the spot: bitsandbytes, torchao and packed GGUF, or the test is skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import ia3

IN, OUT, ROWS = 64, 96, 160  # more rows than features: no weight is as large as an activation
BF16 = torch.bfloat16


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=True, dtype=BF16).requires_grad_(False)


def _bnb_8bit(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    layer.bias.data = layer.bias.to(BF16)
    return layer, bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


def _bnb_4bit(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=BF16)
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    layer.bias.data = layer.bias.to(BF16)
    return layer, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _torchao(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(linear)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    return layer[0].requires_grad_(False), layer[0].weight.dequantize()


def gguf_layer(weight: Tensor, kind: str = "Q4_1") -> Any:
    gguf = pytest.importorskip("gguf")
    layers = pytest.importorskip("transformers.integrations.gguf.utils")
    number = gguf.GGMLQuantizationType[kind]
    layer = layers.GgufLinear(weight.shape[1], weight.shape[0], int(number))
    layer.weight.data.copy_(torch.from_numpy(gguf.quants.quantize(weight.float().numpy(), number)))
    return layer


def gguf_values(layer: Any) -> Tensor:
    """The weight of a packed GGUF layer, by the format's own package."""
    gguf = pytest.importorskip("gguf")
    return torch.from_numpy(gguf.quants.dequantize(layer.weight.numpy(), gguf.GGMLQuantizationType(layer.ggml_type)))


def _gguf(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    layer = gguf_layer(linear.weight)
    layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return layer, gguf_values(layer)


KINDS: dict[str, Callable[[nn.Linear], tuple[nn.Module, Tensor]]] = {
    "bnb 8-bit": _bnb_8bit,
    "bnb nf4": _bnb_4bit,
    "torchao int8": _torchao,
    "gguf": _gguf,
}


def loaded(folder: Path, kind: str, dtype: torch.dtype = BF16) -> Any:
    """The model saved in ``folder``, quantized while it is loaded, as users do it."""
    if kind == "gguf":
        return packed_model(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    if kind == "torchao int8":
        torchao = pytest.importorskip("torchao.quantization")
        config: Any = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = (
            transformers.BitsAndBytesConfig(load_in_8bit=True)
            if kind == "bnb 8-bit"
            else transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=dtype
    )


def packed_model(model: Any) -> Any:
    """``model`` with its linear layers packed by transformers' own function; loading a packed file needs a GPU."""
    pytest.importorskip("gguf")
    layers = pytest.importorskip("transformers.integrations.gguf.utils")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    packed = {name: gguf_layer(linear.weight.detach(), "Q8_0") for name, linear in linears.items()}
    plan = {f"{name}.weight": layer.ggml_type for name, layer in packed.items()}
    replaced = layers.replace_with_gguf_modules(model, plan, SimpleNamespace(supports=lambda ggml_type: True))
    assert len(replaced) == len(linears)
    for name, layer in packed.items():
        model.get_submodule(name).weight.data = layer.weight.data
        if linears[name].bias is not None:
            model.get_submodule(name).bias.data = linears[name].bias.data
    return model


def eager_model(model: ia3.PeftModel) -> Any:
    """The same quantized layers and vectors by PEFT's formula, written with hooks, in fp32 between the layers."""
    vectors = {path: (layer.is_feedforward, layer.ia3_l["default"]) for path, layer in model.base_model.scaled_layers()}
    vectors = {path: (side, nn.Parameter(vector.detach().clone())) for path, (side, vector) in vectors.items()}
    base = copy.deepcopy(model).unload()
    for path, (is_feedforward, vector) in vectors.items():
        layer = base.get_submodule(path)
        flat = vector.reshape(-1)

        def scale_input(layer: Any, args: Any, flat: Tensor = flat) -> Any:
            return ((args[0].float() * flat).to(args[0].dtype),)

        def scale_output(layer: Any, args: Any, y: Tensor, flat: Tensor = flat) -> Any:
            return (y.float() * flat).to(y.dtype)

        if is_feedforward:
            layer.register_forward_pre_hook(scale_input)
        else:
            layer.register_forward_hook(scale_output)
    return base, {path: vector for path, (_, vector) in vectors.items()}


def dequantized_model(base: Any, kind: str) -> Any:
    """``base`` in fp64, its quantized layers as plain ones, hooks and all."""
    for path, layer in list(base.named_modules()):
        if type(layer).__name__ in ("Linear8bitLt", "Linear4bit", "GgufLinear") or kind == "torchao int8":
            weight = _weight_of(layer)
            if weight is not None:
                plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                plain.weight.data = weight
                plain._forward_hooks, plain._forward_pre_hooks = layer._forward_hooks, layer._forward_pre_hooks
                parent, _, name = path.rpartition(".")
                setattr(base.get_submodule(parent), name, plain.requires_grad_(False))
    return base.double()


def _weight_of(layer: Any) -> Tensor | None:
    if type(layer).__name__ == "Linear8bitLt":
        bnb = pytest.importorskip("bitsandbytes")
        return bnb.functional.int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)  # type: ignore[no-any-return]
    if type(layer).__name__ == "Linear4bit":
        bnb = pytest.importorskip("bitsandbytes")
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # type: ignore[no-any-return]
    if type(layer).__name__ == "GgufLinear":
        return gguf_values(layer)
    return layer.weight.dequantize() if type(layer) is nn.Linear and hasattr(layer.weight, "qdata") else None
