"""Single layers with vectors, without a model around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ia3


def scaled_layer(
    base: nn.Module, is_feedforward: bool, adapters: Sequence[str] = ("default",), init_ones: bool = False
) -> Any:
    """Return an accelerated layer around ``base``, with these adapters active together; fp32 vectors."""
    model = nn.Sequential(base)
    for name in adapters:
        config = ia3.IA3Config(
            target_modules=["0"],
            feedforward_modules=["0"] if is_feedforward else [],
            init_ia3_weights=init_ones,
            fan_in_fan_out=type(base).__name__ == "Conv1D",
        )
        ia3.inject_adapter_in_model(config, model, name)
    layer: Any = model[0]
    for name, vector in layer.ia3_l.items():
        layer.ia3_l[name] = nn.Parameter(vector.detach().to(torch.promote_types(vector.dtype, torch.float32)))
    layer.set_adapter(list(adapters))
    return layer


def word_tokenizer() -> Any:
    """Return a tokenizer of the words ``a`` to ``h``, for models with 64 tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate("abcdefgh")}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "</s>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
