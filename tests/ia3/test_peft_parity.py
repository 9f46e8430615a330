"""Against PEFT itself: names, results, gradients and files, for every family."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ia3

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _twin(model: ia3.PeftModel, family: Any, dtype: torch.dtype) -> nn.Module:
    """The same model and vectors under PEFT."""
    config = peft.IA3Config(task_type=family.task, **family.targets)
    twin = peft.get_peft_model(family.build().to(dtype), config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def _run(model: nn.Module, family: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    result = model(**family.inputs())
    result.loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    return result.logits.detach().double(), gradients


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())


def test_names_shapes_dtypes_and_trainability_are_those_of_peft(
    any_family: Any, adapted: Callable[..., ia3.PeftModel]
) -> None:
    family = any_family
    ours = adapted(family, torch.bfloat16)
    theirs = _twin(ours, family, torch.bfloat16)
    facts = [
        {(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} for model in (ours, theirs)
    ]
    assert facts[0] == facts[1]
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_and_gradients_are_as_exact_as_those_of_peft(
    any_family: Any, adapted: Callable[..., ia3.PeftModel], dtype: torch.dtype
) -> None:
    family = any_family
    ours = adapted(family, dtype)
    theirs = _twin(ours, family, dtype)
    oracle = copy.deepcopy(theirs).double()
    logits, gradients = _run(ours, family)
    peft_logits, peft_gradients = _run(theirs, family)
    true_logits, true_gradients = _run(oracle, family)
    # PEFT's own distance from fp64 is what rounding does to this model; twice that allows for another order.
    floor = torch.finfo(dtype).eps
    assert _distance(logits, true_logits) <= 2 * _distance(peft_logits, true_logits) + floor
    for name, true in true_gradients.items():
        allowed = 2 * _distance(peft_gradients[name], true) + floor * float(true.norm()) + 1e-9
        assert _distance(gradients[name], true) <= allowed, name


def test_files_go_both_ways(family: Any, adapted: Callable[..., ia3.PeftModel], tmp_path: Path) -> None:
    ours = adapted(family)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(family.build(), str(tmp_path / "ours")).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = ia3.PeftModel.from_pretrained(family.build(), tmp_path / "theirs")

    first, second = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    inputs = family.inputs()
    logits = ours(**inputs).logits
    assert torch.equal(again(**inputs).logits, logits)
    torch.testing.assert_close(theirs(**inputs).logits, logits)


def _content(folder: Path) -> dict[str, Any]:
    """What an adapter's folders hold: tensors as bytes, the fields of the configurations."""
    content: dict[str, Any] = {}
    for path in sorted(folder.rglob("adapter_*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            for key, tensor in load_file(path).items():
                content[f"{name}: {key}"] = (tensor.dtype, tensor.tolist())
        else:
            fields = json.loads(path.read_text())
            # Each writes its own version, and sets in any order.
            content[name] = {key: sorted(v) if isinstance(v, list) else v for key, v in fields.items()}
            content[name]["peft_version"] = None
    return content


def _assert_both_ways(family: Any, folder: Path, **config: Any) -> None:
    """Two adapters that PEFT saved: ours holds the same, computes the same, and saves the same files."""
    arguments = dict(family.targets, task_type=family.task) | config
    theirs = peft.get_peft_model(family.build(), peft.IA3Config(**arguments))
    theirs.add_adapter("french", peft.IA3Config(**arguments))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ia3_l" in name or "modules_to_save" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    theirs.eval().save_pretrained(str(folder / "theirs"))

    ours = ia3.PeftModel.from_pretrained(family.build(), folder / "theirs")
    ours.load_adapter(folder / "theirs" / "french", "french")
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]), name
    ours.save_pretrained(folder / "ours")
    assert _content(folder / "ours") == _content(folder / "theirs")

    again = peft.PeftModel.from_pretrained(family.build(), str(folder / "ours")).eval()
    again.load_adapter(str(folder / "ours" / "french"), "french")
    for adapter in ("default", "french"):
        for model in (ours, theirs, again):
            model.set_adapter(adapter)
        with torch.no_grad():
            logits = theirs(**family.inputs()).logits
            assert torch.equal(again(**family.inputs()).logits, logits)
            torch.testing.assert_close(ours(**family.inputs()).logits, logits)


def test_adapters_that_peft_saved_are_loaded_and_saved_as_peft_does(any_family: Any, tmp_path: Path) -> None:
    _assert_both_ways(any_family, tmp_path)


@pytest.mark.parametrize(
    ("name", "task", "architecture", "saved"),
    [
        ("llama", "CAUSAL_LM", "LlamaForCausalLM", ["lm_head"]),
        ("llama", "CAUSAL_LM", "LlamaForCausalLM", ["embed_tokens", "input_layernorm"]),
        ("gpt2", "CAUSAL_LM", "GPT2LMHeadModel", ["ln_f"]),
        ("llama", "SEQ_CLS", "LlamaForSequenceClassification", None),
        ("llama", "TOKEN_CLS", "LlamaForTokenClassification", ["norm"]),
        ("bert", "TOKEN_CLS", "BertForTokenClassification", ["pooler", "classifier"]),
    ],
)
def test_modules_to_save_go_along(
    families: dict[str, Any], name: str, task: str, architecture: str, saved: list[str] | None, tmp_path: Path
) -> None:
    family = dataclasses.replace(families[name], task=task, architecture=architecture)
    if task != "CAUSAL_LM":
        family = dataclasses.replace(family, sizes={**family.sizes, "num_labels": 3})
    _assert_both_ways(family, tmp_path, modules_to_save=saved)


@pytest.mark.parametrize("is_tied", [False, True])
def test_embeddings_go_along_when_asked_for(family: Any, is_tied: bool, tmp_path: Path) -> None:
    arguments = dict(family.targets, task_type=family.task)
    base = family.build(tie_word_embeddings=is_tied)
    ours = ia3.get_peft_model(base, ia3.IA3Config(**arguments))
    theirs = peft.get_peft_model(copy.deepcopy(family.build(tie_word_embeddings=is_tied)), peft.IA3Config(**arguments))
    theirs.load_state_dict(ours.state_dict())
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=True)
    assert _content(tmp_path / "ours") == _content(tmp_path / "theirs")
    assert any("embed" in key or "wte" in key or "shared" in key for key in _content(tmp_path / "ours"))

    fresh = family.build(seed=9, tie_word_embeddings=is_tied)
    loaded = ia3.PeftModel.from_pretrained(fresh, tmp_path / "theirs")
    assert torch.equal(loaded.get_input_embeddings().weight, base.get_input_embeddings().weight)
    if (head := loaded.get_output_embeddings()) is not None:
        assert torch.equal(head.weight, base.get_output_embeddings().weight)
    assert peft.PeftModel.from_pretrained(family.build(), str(tmp_path / "ours"))


def test_noise_for_initial_vectors_is_that_of_peft(families: dict[str, Any]) -> None:
    family = families["llama"]
    torch.manual_seed(3)
    ours = ia3.get_peft_model(base := family.build(), ia3.IA3Config(init_ia3_weights=False))
    torch.manual_seed(3)
    theirs = peft.get_peft_model(family.build(), peft.IA3Config(init_ia3_weights=False))
    assert base is ours.get_base_model()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_arguments_by_position_mean_what_they_mean_in_peft(
    families: dict[str, Any], adapted: Callable[..., ia3.PeftModel], name: str
) -> None:
    family = families[name]
    ours = adapted(family)
    theirs = _twin(ours, family, torch.float32)
    inputs = family.inputs()
    ids, labels = inputs["input_ids"], inputs["labels"]
    # In PEFT: ids, mask, embeddings, then labels (of T5: the decoder's ids).
    arguments = (ids, torch.ones_like(ids), None, ids if name == "t5" else labels)
    with torch.no_grad():
        got, expected = ours(*arguments), theirs(*arguments)
    torch.testing.assert_close(got.logits, expected.logits)
    assert (got.loss is None) == (expected.loss is None) == (name == "t5")
