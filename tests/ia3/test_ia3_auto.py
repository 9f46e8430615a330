"""Adapters loaded with their base models: the right class of model, and room for new tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import ia3

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_BERT = _LLAMA | {"vocab_size": 64}
_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 64}

# task -> the suffix of the class, the base model's class and its configuration
TASKS: dict[str, tuple[str, str, Any]] = {
    "CAUSAL_LM": ("CausalLM", "LlamaForCausalLM", transformers.LlamaConfig(**_LLAMA, vocab_size=64)),
    "FEATURE_EXTRACTION": ("FeatureExtraction", "BertModel", transformers.BertConfig(**_BERT)),
    "QUESTION_ANS": ("QuestionAnswering", "BertForQuestionAnswering", transformers.BertConfig(**_BERT)),
    "SEQ_2_SEQ_LM": ("Seq2SeqLM", "T5ForConditionalGeneration", transformers.T5Config(**_T5)),
    "SEQ_CLS": ("SequenceClassification", "BertForSequenceClassification", transformers.BertConfig(**_BERT)),
    "TOKEN_CLS": ("TokenClassification", "BertForTokenClassification", transformers.BertConfig(**_BERT)),
}


def _save(folder: Path, task: str | None, architecture: str, config: Any) -> nn.Module:
    """Save a base model and an adapter with vectors far from ones; returns the adapted model in eval mode."""
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(folder / "base")
    base = getattr(transformers, architecture).from_pretrained(folder / "base")
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type=task))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    model.save_pretrained(folder / "adapter")
    return model.eval()


def _results(model: nn.Module) -> list[torch.Tensor]:
    ids = torch.arange(3, 10)[None]
    arguments = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    return [value for value in model(input_ids=ids, **arguments).to_tuple() if isinstance(value, torch.Tensor)]


def _rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("is_of_the_task", [True, False], ids=["class of the task", "AutoPeftModel"])
def test_the_model_that_was_saved_comes_back(tmp_path: Path, task: str, is_of_the_task: bool) -> None:
    suffix, architecture, config = TASKS[task]
    saved = _save(tmp_path, task, architecture, config)
    auto = getattr(ia3, f"AutoPeftModelFor{suffix}") if is_of_the_task else ia3.AutoPeftModel
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, ia3.IA3Model)
    assert type(loaded.get_base_model()) is getattr(transformers, architecture)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for ours, before in zip(_results(loaded), _results(saved), strict=True):
        assert torch.equal(ours, before)


def test_classes_carry_pefts_names() -> None:
    wanted = {name for name in vars(peft) if name.startswith("AutoPeftModel")}
    assert len(wanted) == 7
    for name in wanted:
        assert getattr(ia3, name).__name__ == name
        assert getattr(ia3, name).__module__ == "ia3.auto"


@pytest.mark.parametrize("auto", ["AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_without_a_task_the_class_is_the_one_that_was_adapted(tmp_path: Path, auto: str) -> None:
    saved = _save(tmp_path, None, "LlamaForCausalLM", TASKS["CAUSAL_LM"][2])
    loaded = getattr(ia3, auto).from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is transformers.LlamaForCausalLM
    assert torch.equal(_results(loaded)[0], _results(saved)[0])


def test_without_task_and_mapping_the_class_that_is_called_decides(tmp_path: Path) -> None:
    _save(tmp_path, None, "LlamaForCausalLM", TASKS["CAUSAL_LM"][2])
    _rewrite(tmp_path, auto_mapping=None)
    loaded = ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is transformers.LlamaForCausalLM
    with pytest.raises(ia3.IA3Error, match=r"without a task_type .* use the AutoPeftModelFor… class"):
        ia3.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_arguments_reach_the_adapter_or_the_base_model(tmp_path: Path) -> None:
    _save(tmp_path, "CAUSAL_LM", "LlamaForCausalLM", TASKS["CAUSAL_LM"][2])
    shutil.copytree(tmp_path / "adapter", tmp_path / "all" / "french")
    loaded = ia3.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "all", "french", True, subfolder="french", dtype=torch.bfloat16, autocast_adapter_dtype=False
    )
    assert loaded.active_adapters == ["french"]
    assert loaded.get_base_model().dtype == torch.bfloat16
    vectors = [p for name, p in loaded.named_parameters() if "ia3_l" in name]
    assert {(p.dtype, p.requires_grad) for p in vectors} == {(torch.bfloat16, True)}

    given = ia3.IA3Config.from_pretrained(tmp_path / "adapter")
    given.unknown_fields = {"note": "given"}
    loaded = ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", config=given)
    assert loaded.active_peft_config.unknown_fields == {"note": "given"}


@pytest.mark.parametrize("extra", [0, 3])
def test_new_tokens_of_a_saved_tokenizer_find_room(tiny_model: Path, tmp_path: Path, extra: int) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    size = base.get_input_embeddings().weight.shape[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens([f"<new {i}>" for i in range(extra)])
    base.resize_token_embeddings(len(tokenizer))
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM", modules_to_save=["lm_head", "embed_tokens"]))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    loaded = ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer) == size + extra
    assert torch.equal(_results(loaded)[0], _results(model.eval())[0])


def test_a_smaller_tokenizer_takes_no_room_away(tiny_model: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    size = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(size + 5)
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "adapter")
    loaded = ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.get_input_embeddings().weight.shape[0] == size + 5


def test_pefts_adapters_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(TASKS["CAUSAL_LM"][2]).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False)).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(_results(ours)[0], _results(theirs)[0])


_NO_BASE = r"no base_model_name_or_path; load the base model yourself"
_MAPPED = {"task_type": None, "auto_mapping": {"parent_library": "transformers", "base_model_class": "NoSuch"}}
_EVIL = {"task_type": None, "auto_mapping": {"parent_library": "os", "base_model_class": "system"}}
_LOOKALIKE = {"task_type": None, "auto_mapping": {"parent_library": "transformers_evil", "base_model_class": "X"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, _NO_BASE),
        ({"base_model_name_or_path": ""}, _NO_BASE),
        ({"base_model_name_or_path": "/no/such/folder"}, r"base model '/no/such/folder', .* cannot be loaded"),
        (
            {"task_type": "SEQ_CLS"},
            r"task_type 'SEQ_CLS', which AutoPeftModelForCausalLM .* use AutoPeftModelForSequence",
        ),
        (_MAPPED, r"names 'NoSuch' of 'transformers', which is no model class"),
        (_EVIL, r"imports 'os', which is not in the import allowlist \(transformers\)"),
        (_LOOKALIKE, r"imports 'transformers_evil', which is not in the import allowlist"),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _save(tmp_path, "CAUSAL_LM", "LlamaForCausalLM", TASKS["CAUSAL_LM"][2])
    _rewrite(tmp_path, **changes)
    with pytest.raises(ia3.IA3Error, match=message) as caught:
        ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_packages_that_the_caller_trusts_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, "CAUSAL_LM", "LlamaForCausalLM", TASKS["CAUSAL_LM"][2])
    (tmp_path / "trusted_models").mkdir()
    (tmp_path / "trusted_models" / "__init__.py").touch()
    (tmp_path / "trusted_models" / "llama.py").write_text("from transformers import LlamaForCausalLM as Ours")
    monkeypatch.syspath_prepend(tmp_path)
    _rewrite(
        tmp_path, task_type=None, auto_mapping={"parent_library": "trusted_models.llama", "base_model_class": "Ours"}
    )
    load: Callable[..., ia3.IA3Model] = ia3.AutoPeftModel.from_pretrained
    with pytest.raises(ia3.IA3Error, match="allowlist"):
        load(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", import_allowlist=["trusted_models"])
    assert type(loaded.get_base_model()) is transformers.LlamaForCausalLM


def test_the_classes_make_no_objects() -> None:
    with pytest.raises(ia3.IA3Error, match=r"call AutoPeftModelForCausalLM\.from_pretrained"):
        ia3.AutoPeftModelForCausalLM()
