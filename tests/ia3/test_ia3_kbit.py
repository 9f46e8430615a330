"""What ``prepare_model_for_kbit_training`` does to a model, against what PEFT's function does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import ia3

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

_Load = Callable[[torch.dtype], nn.Module]


@pytest.fixture(params=["unquantized", "bnb 8-bit", "bnb 4-bit", "bnb 4-bit stored as bf16", "torchao"])
def load(request: pytest.FixtureRequest, families: dict[str, Any], tmp_path: Path) -> _Load:
    """Load the same tiny Llama again and again, quantized in one of these ways."""
    families["llama"].build().save_pretrained(tmp_path)

    def quantization() -> dict[str, Any]:
        if request.param == "unquantized":
            return {}
        if request.param == "torchao":
            torchao = pytest.importorskip("torchao.quantization")
            return {"quantization_config": transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())}
        pytest.importorskip("bitsandbytes")
        options: dict[str, Any] = {"load_in_8bit": True}
        if "4-bit" in request.param:
            options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        if "bf16" in request.param:
            options["bnb_4bit_quant_storage"] = torch.bfloat16
        return {"quantization_config": transformers.BitsAndBytesConfig(**options)}

    def make(dtype: torch.dtype) -> nn.Module:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=dtype, device_map="cpu", **quantization()
        )
        return model

    return make


def _state(model: Any) -> Any:
    parameters = [(name, p.requires_grad, p.dtype, type(p), p.shape) for name, p in model.named_parameters()]
    reentrant = [
        layer._gradient_checkpointing_func.keywords.get("use_reentrant", True)
        for layer in model.model.layers
        if layer.gradient_checkpointing
    ]
    embedded = model.get_input_embeddings()(torch.zeros(1, dtype=torch.long))
    return parameters, model.is_gradient_checkpointing, reentrant, embedded.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["default", "no checkpointing", "not reentrant", "reentrant"],
)
def test_does_to_a_model_what_pefts_does(load: _Load, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    ours, theirs = load(dtype), load(dtype)
    before = {name: p.detach().clone() for name, p in ours.named_parameters() if type(p) is nn.Parameter}
    assert ia3.prepare_model_for_kbit_training(ours, **arguments) is ours
    peft.prepare_model_for_kbit_training(theirs, **arguments)
    assert _state(ours) == _state(theirs)
    for name, parameter in ours.named_parameters():
        assert not parameter.requires_grad
        if name in before:  # not packed
            assert torch.equal(parameter.to(dtype), before[name].to(dtype)), name


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_the_model_trains_without_complaints(load: _Load, batch: dict[str, Any], use_reentrant: bool | None) -> None:
    options = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(use_reentrant|requires_grad=True|gradient_checkpointing).*")
        base = ia3.prepare_model_for_kbit_training(load(torch.bfloat16), gradient_checkpointing_kwargs=options)
        model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM")).train()
        model(**batch).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients
    assert all(bool(gradient.any()) and bool(gradient.isfinite().all()) for gradient in gradients)


def test_hooks_of_checkpointing_can_be_taken_out_again(load: _Load) -> None:
    model: Any = ia3.prepare_model_for_kbit_training(load(torch.bfloat16))
    if model.is_gradient_checkpointing:
        model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks


def test_other_models_with_embeddings_get_their_gradient_too() -> None:
    class Model(nn.Module):
        """What the function asks for, without transformers' classes."""

        is_loaded_in_8bit = True

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 3, dtype=torch.float16)
            self.asked: dict[str, Any] = {}

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
            self.asked = gradient_checkpointing_kwargs

    model = Model()
    ia3.prepare_model_for_kbit_training(model)
    assert model.asked == {"use_reentrant": True}
    embedded = model.embedding(torch.tensor([1]))
    assert (embedded.dtype, embedded.requires_grad) == (torch.float32, True)
