"""Which modules a configuration means, against PEFT, and what is said when it means none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import ia3
from ia3.planning import plan_adapter


def _vectors(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters() if "ia3_l" in name}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]}),
        (
            "llama",
            {"target_modules": "all-linear", "feedforward_modules": [], "exclude_modules": ["mlp.up_proj", "o_proj"]},
        ),
        ("llama", {"target_modules": r".*\.(q|mlp\.down)_proj", "feedforward_modules": r".*mlp.*"}),
        ("llama", {"target_modules": ["k_proj", "down_proj"], "exclude_modules": r".*layers\.0\..*"}),
        ("llama", {"target_modules": ["model.layers.1.mlp.down_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "feedforward_modules": ["c_fc"]}),
        ("bert", {"target_modules": "all-linear", "feedforward_modules": [], "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": ["dense"], "task_type": "SEQ_CLS"}),
        ("t5", {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", "feedforward_modules": []}),
    ],
)
def test_targets_are_those_of_peft(families: dict[str, Any], name: str, arguments: dict[str, Any]) -> None:
    family = families[name]
    ours = ia3.get_peft_model(family.build(), ia3.IA3Config(**arguments))
    theirs = peft.get_peft_model(family.build(), peft.IA3Config(**arguments))
    assert _vectors(ours) == _vectors(theirs)
    # What is saved has to load again: lists keep the subset rule.
    again = ia3.IA3Config(**dict(ours.peft_config["default"].to_dict().items()))
    assert [target.is_feedforward for target in plan_adapter(family.build(), again).targets] == [
        target.is_feedforward for target in plan_adapter(family.build(), ia3.IA3Config(**arguments)).targets
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_modules": ["k_prj", "v_proj"]}, ["'k_prj'", "did you mean", "'k_proj'"]),
        ({"target_modules": ["fc1"]}, ["'fc1'", "linear layers", "'gate_proj'"]),
        ({"target_modules": "q_proj"}, ["regular expression", "'q_proj'"]),
        ({"target_modules": []}, ["empty"]),
        ({"target_modules": "all-linear", "feedforward_modules": ["mlp.fc1"]}, ["feedforward_modules", "'mlp.fc1'"]),
        ({"target_modules": ["self_attn"]}, ["LlamaAttention", "model.layers.0.self_attn"]),
        ({"target_modules": ["embed_tokens"]}, ["Embedding"]),
        ({"target_modules": ["k_proj"], "exclude_modules": ["k_proj"]}, ["nothing is left"]),
        ({"modules_to_save": ["classifier"]}, ["modules_to_save", "'classifier'", "'lm_head'"]),
    ],
)
def test_what_matches_nothing_is_one_sentence_and_changes_nothing(
    llama: nn.Module, snapshot: Callable[[nn.Module], Any], arguments: dict[str, Any], words: list[str]
) -> None:
    before = snapshot(llama)
    with pytest.raises(ia3.IA3Error) as caught:
        ia3.get_peft_model(llama, ia3.IA3Config(**arguments))
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message
    assert snapshot(llama) == before


def test_an_unknown_model_type_asks_for_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ia3.IA3Error, match="target_modules is not set"):
        ia3.get_peft_model(model, ia3.IA3Config())
    with pytest.raises(ia3.IA3Error, match="feedforward_modules is not set"):
        ia3.get_peft_model(model, ia3.IA3Config(target_modules=["0"]))
    adapted = ia3.get_peft_model(model, ia3.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert adapted(torch.ones(1, 4)).shape == (1, 4)


def test_fused_experts_are_explained() -> None:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(ia3.IA3Error, match=r"'w2'.*experts are fused.*target_parameters.*k_proj"):
        ia3.get_peft_model(model, ia3.IA3Config(target_modules=["k_proj", "w2"], feedforward_modules=["w2"]))
    assert ia3.get_peft_model(model, ia3.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))


@pytest.mark.parametrize(("name", "given", "found"), [("gpt2", False, True), ("llama", True, False)])
def test_a_wrong_fan_in_fan_out_is_corrected(families: dict[str, Any], name: str, given: bool, found: bool) -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = ia3.get_peft_model(families[name].build(), ia3.IA3Config(fan_in_fan_out=given))
    assert model.peft_config["default"].fan_in_fan_out is found


def test_a_feedforward_pattern_without_targets_is_warned_about(families: dict[str, Any]) -> None:
    config = ia3.IA3Config(target_modules=r".*decoder.*SelfAttention\.(q|v)", feedforward_modules=r".*decoder.*fc2$")
    with pytest.warns(UserWarning, match="none of the 4 targets"):
        ia3.get_peft_model(families["t5"].build(), config)


def test_the_users_configuration_is_not_changed(llama: nn.Module) -> None:
    config = ia3.IA3Config()
    ia3.get_peft_model(llama, config)
    assert config == ia3.IA3Config()
