"""Tiny models of every family, built from configurations: no downloads, fractions of a second each."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import ia3

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = dict(_SIZES, num_key_value_heads=2, **_SPECIAL)
_T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """One kind of model, its task, and where PEFT's defaults do not know it, its targets."""

    name: str
    architecture: str
    config: str
    sizes: dict[str, Any]
    task: str = "CAUSAL_LM"
    targets: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0, **changes: Any) -> nn.Module:
        """The model in eval mode; the same seed gives the same weights."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**self.sizes, **changes})
        return getattr(transformers, self.architecture)(config).eval()

    def inputs(self) -> dict[str, Tensor]:
        """A batch with labels."""
        ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
        labels = {"SEQ_CLS": torch.tensor([0, 2]), "TOKEN_CLS": ids % 3}.get(self.task, ids)
        return {"input_ids": ids, "labels": labels}


FAMILIES = (
    Family("llama", "LlamaForCausalLM", "LlamaConfig", _GROUPED),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    Family("gemma", "GemmaForCausalLM", "GemmaConfig", dict(_GROUPED, head_dim=8)),
    Family("phi", "PhiForCausalLM", "PhiConfig", dict(_SIZES, **_SPECIAL)),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "Phi3Config",
        _GROUPED,
        targets={"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    Family("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", dict(_SIZES, **_SPECIAL)),
    Family(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, **_SPECIAL)
        | {"word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=64, **_SPECIAL),
        targets={"fan_in_fan_out": True},
    ),
    Family("t5", "T5ForConditionalGeneration", "T5Config", _T5, "SEQ_2_SEQ_LM"),
    Family(
        "t5_gated",
        "T5ForConditionalGeneration",
        "T5Config",
        dict(_T5, feed_forward_proj="gated-gelu"),
        "SEQ_2_SEQ_LM",
    ),
    Family("bert", "BertForSequenceClassification", "BertConfig", dict(_SIZES, num_labels=3), "SEQ_CLS"),
    Family("roberta", "RobertaForTokenClassification", "RobertaConfig", dict(_SIZES, num_labels=3), "TOKEN_CLS"),
)
BY_NAME = {family.name: family for family in FAMILIES}

_HEADS = dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=64, **_SPECIAL)
_BART = {
    f"{half}_{name}": size
    for half in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}
_NEO = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, **_SPECIAL}
# The other model types that have default targets; only tests against PEFT ask for them.
MORE_FAMILIES = (
    Family("mt5", "MT5ForConditionalGeneration", "MT5Config", _T5, "SEQ_2_SEQ_LM"),
    Family(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        dict(_BART, d_model=32, vocab_size=64, max_position_embeddings=64, decoder_start_token_id=2, **_SPECIAL),
        "SEQ_2_SEQ_LM",
    ),
    Family(
        "bloom", "BloomForCausalLM", "BloomConfig", dict(_SPECIAL, hidden_size=32, n_layer=2, n_head=4, vocab_size=64)
    ),
    Family("falcon", "FalconForCausalLM", "FalconConfig", dict(_SIZES, ffn_hidden_size=48, **_SPECIAL)),
    Family("gptj", "GPTJForCausalLM", "GPTJConfig", dict(_HEADS, rotary_dim=4)),
    Family("gpt_neo", "GPTNeoForCausalLM", "GPTNeoConfig", dict(_NEO, attention_types=[[["global", "local"], 1]])),
    Family("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", _HEADS),
    Family("mistral", "MistralForCausalLM", "MistralConfig", _GROUPED),
    Family("gemma2", "Gemma2ForCausalLM", "Gemma2Config", dict(_GROUPED, head_dim=8)),
    Family("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", dict(_GROUPED, head_dim=8)),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", dict(_GROUPED, head_dim=8)),
    Family("deberta", "DebertaForSequenceClassification", "DebertaConfig", dict(_SIZES, num_labels=3), "SEQ_CLS"),
    Family(
        "deberta-v2", "DebertaV2ForSequenceClassification", "DebertaV2Config", dict(_SIZES, num_labels=3), "SEQ_CLS"
    ),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES, ids=lambda family: family.name)
    if "any_family" in metafunc.fixturenames:
        metafunc.parametrize("any_family", FAMILIES + MORE_FAMILIES, ids=lambda family: family.name)


@pytest.fixture
def families() -> dict[str, Family]:
    return BY_NAME


@pytest.fixture
def llama() -> nn.Module:
    return BY_NAME["llama"].build()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return BY_NAME["llama"].inputs()


@pytest.fixture
def adapted() -> Callable[..., ia3.PeftModel]:
    """Build a family's model with an adapter whose vectors are far from ones, zeros and negatives among them."""

    def build(family: Family, dtype: torch.dtype = torch.float32, **config: Any) -> ia3.PeftModel:
        base = family.build().to(dtype)
        model = ia3.get_peft_model(base, ia3.IA3Config(task_type=family.task, **(family.targets | config)))
        perturb(model)
        return model.eval()

    return build


def perturb(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
                parameter.view(-1)[0] = 0.0


@pytest.fixture
def snapshot() -> Callable[[nn.Module], Any]:
    """Everything that a failed change must not have touched."""

    def take(model: nn.Module) -> Any:
        return (
            [(name, type(module), "forward" in module.__dict__) for name, module in model.named_modules()],
            [id(module) for module in model.modules()],
            [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
            copy.deepcopy({name: value.tolist() for name, value in model.state_dict().items()}),
        )

    return take


@pytest.fixture
def command_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets these for its process; here they must not outlive the test."""
    from ia3.cli.app import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file to fine-tune on."""
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ia3 finetune` leaves, of twelve steps on the tiny model."""
    from .commands import TEXT, finetune

    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    assert finetune(tiny_model, folder / "text.txt", folder / "out", "--steps", 12, "--lr", 0.1) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    from .commands import TEMPLATE

    folder = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
