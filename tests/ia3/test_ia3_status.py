"""What a model says about its adapters, against what PEFT says about the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

import ia3
from ia3 import status

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_Change = Callable[[Any], Any]


def _adapters(library: Any, family: Any, base: nn.Module) -> Any:
    """Two adapters, of which the second has a target less."""
    model = library.get_peft_model(base, library.IA3Config(task_type=family.task, **family.targets))
    second = library.IA3Config(target_modules=r".*1.*(k_proj|key)", feedforward_modules=[], **_heads(family))
    model.add_adapter("second", second)
    return model


def _heads(family: Any) -> dict[str, Any]:
    return {"modules_to_save": ["classifier"]} if family.task == "SEQ_CLS" else {}


def _freeze_one(model: Any) -> None:
    next(p for name, p in model.named_parameters() if "ia3_l.default" in name).requires_grad_(False)


def _freeze_bias_of_head(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("modules_to_save.default.bias"):
            parameter.requires_grad_(False)


def _deactivate_in_one_layer(model: Any) -> None:
    """Which leaves the model inconsistent."""
    layer = next(module for module in model.modules() if hasattr(module, "ia3_l"))
    layer.set_adapter([])


CHANGES: dict[str, _Change] = {
    "as made": lambda model: None,
    "second active": lambda model: model.set_adapter("second"),
    "merged": lambda model: model.merge_adapter(),
    "one merged": lambda model: model.merge_adapter(adapter_names=["second"]),
    "one frozen": _freeze_one,
    "half a head frozen": _freeze_bias_of_head,
    "one layer inactive": _deactivate_in_one_layer,
    "disabled in one layer": lambda model: setattr(
        next(module for module in model.modules() if hasattr(module, "ia3_l")), "_disable_adapters", True
    ),
}


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_and_model_say_what_pefts_say(families: dict[str, Any], name: str, change: _Change) -> None:
    family = families[name]
    ours, theirs = (_adapters(library, family, family.build()) for library in (ia3, peft))
    change(ours)
    change(theirs)
    assert dataclasses.asdict(ours.get_model_status()) == dataclasses.asdict(theirs.get_model_status())
    for row, other in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        own_name = {"module_type": "IA3Layer"} if other.module_type != "ModulesToSaveWrapper" else {}
        assert dataclasses.asdict(row) == dataclasses.asdict(other) | own_name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (status.LayerStatus, peft.peft_model.TunerLayerStatus),
        (status.ModelStatus, peft.peft_model.TunerModelStatus),
    ],
)
def test_fields_are_pefts_in_their_order(ours: type, theirs: type) -> None:
    names = [[entry.name for entry in dataclasses.fields(kind)] for kind in (ours, theirs)]
    assert names[0] == names[1]


def test_the_changes_cover_what_is_irregular(families: dict[str, Any]) -> None:
    """That the comparison above compares more than equal defaults."""
    found = set()
    for change in CHANGES.values():
        model = _adapters(ia3, families["bert"], families["bert"].build())
        change(model)
        found |= {name for name, value in dataclasses.asdict(model.get_model_status()).items() if value == "irregular"}
        found |= {"by name" for value in model.get_model_status().requires_grad.values() if value == "irregular"}
    assert found == {"active_adapters", "merged_adapters", "enabled", "by name"}


def test_tuner_and_injected_model_are_described_as_pefts(families: dict[str, Any]) -> None:
    family = families["llama"]
    ours, theirs = (_adapters(library, family, family.build()) for library in (ia3, peft))
    for mine, other in ((ours.base_model, theirs.base_model), (ours.get_base_model(), theirs.get_base_model())):
        assert dataclasses.asdict(ia3.get_model_status(mine)) == dataclasses.asdict(peft.get_model_status(other))
        names = [[row.name for row in rows] for rows in (ia3.get_layer_status(mine), peft.get_layer_status(other))]
        assert names[0] == names[1]
    assert ia3.get_model_status(nn.Sequential(ours.get_base_model())).base_model_type == "other"


def test_a_model_without_adapters_is_an_error(llama: nn.Module) -> None:
    for function in (ia3.get_layer_status, ia3.get_model_status):
        with pytest.raises(ia3.IA3Error, match="LlamaForCausalLM carries no IA3 adapters"):
            function(llama)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_packed_4bit_values_are_counted_each(storage: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 48, bias=False, quant_storage=storage)
    layer.weight = bnb.nn.Params4bit(torch.randn(48, 64), requires_grad=False, quant_storage=storage)
    layer.to("cpu")
    assert layer.weight.numel() * layer.weight.element_size() == 48 * 64 // 2  # it is packed
    assert status.parameter_count(layer.weight) == 48 * 64
    assert status.parameter_counts(layer) == peft.PeftModel.get_nb_trainable_parameters(layer) == (0, 48 * 64)


def test_parameters_partitioned_by_deepspeed_are_counted_whole() -> None:
    partitioned = nn.Parameter(torch.empty(0))
    partitioned.ds_numel = 12
    gathered = nn.Parameter(torch.empty(3, 4))
    gathered.ds_numel = 12
    assert status.parameter_count(partitioned) == status.parameter_count(gathered) == 12
    assert status.parameter_count(torch.empty(0)) == 0
    model = SimpleNamespace(parameters=lambda: [partitioned, gathered, torch.empty(0)])
    assert status.parameter_counts(model) == (24, 24)  # type: ignore[arg-type]
