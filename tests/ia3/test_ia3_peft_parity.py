"""Against PEFT itself: names, results, gradients and files, for every family."""

from __future__ import annotations

import copy
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


def _twin(model: ia3.IA3Model, family: Any, dtype: torch.dtype) -> nn.Module:
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
    family: Any, adapted: Callable[..., ia3.IA3Model]
) -> None:
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
    family: Any, adapted: Callable[..., ia3.IA3Model], dtype: torch.dtype
) -> None:
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


def test_files_go_both_ways(family: Any, adapted: Callable[..., ia3.IA3Model], tmp_path: Path) -> None:
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


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_named_adapters_have_their_own_folder(
    families: dict[str, Any], name: str, tmp_path: Path, adapted: Callable[..., ia3.IA3Model]
) -> None:
    family = families[name]
    source = peft.get_peft_model(family.build(), peft.IA3Config(task_type=family.task), adapter_name="french")
    source.save_pretrained(str(tmp_path / "theirs"))
    ours = ia3.IA3Model.from_pretrained(family.build(), tmp_path / "theirs" / "french", adapter_name="french")
    assert any(name.endswith("ia3_l.french") for name, _ in ours.named_parameters())
    ours.save_pretrained(tmp_path / "ours")
    assert peft.PeftModel.from_pretrained(family.build(), str(tmp_path / "ours" / "french"))


def test_noise_for_initial_vectors_is_that_of_peft(families: dict[str, Any]) -> None:
    family = families["llama"]
    torch.manual_seed(3)
    ours = ia3.get_peft_model(base := family.build(), ia3.IA3Config(init_ia3_weights=False))
    torch.manual_seed(3)
    theirs = peft.get_peft_model(family.build(), peft.IA3Config(init_ia3_weights=False))
    assert base is ours.get_base_model()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
