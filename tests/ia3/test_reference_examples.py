"""Every example of PEFT's documentation of IA3, with only the import changed, on tiny models of the same families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from ia3 import IA3Config, TaskType, get_peft_model, prepare_model_for_kbit_training

from .conftest import BY_NAME, Family, perturb

# Sizes of the tiny models, from their configurations in conftest.py.
LAYERS, HIDDEN, INNER, KEY_VALUE = 2, 32, 48, 16
BERT_SEQUENCES = BY_NAME["bert"]
BERT_TOKENS = dataclasses.replace(BERT_SEQUENCES, architecture="BertForTokenClassification", task="TOKEN_CLS")
LLAMA_SEQUENCES = dataclasses.replace(BY_NAME["llama"], architecture="LlamaForSequenceClassification", task="SEQ_CLS")


@dataclass(frozen=True)
class Example:
    """The arguments of a configuration, the model that it is for, and how many parameters it trains there."""

    family: Family
    arguments: dict[str, Any]
    trained: int
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> nn.Module:
        return self.family.build(**self.sizes)

    def inputs(self) -> dict[str, Tensor]:
        batch = self.family.inputs()
        return {**batch, "labels": batch["labels"] % self.sizes.get("num_labels", self.family.sizes["vocab_size"])}


EXAMPLES = {
    "basic": Example(
        BY_NAME["opt"],
        {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": [], "init_ia3_weights": True},
        LAYERS * 2 * HIDDEN,
    ),
    "with feed-forward modules": Example(
        BY_NAME["opt"],
        {"target_modules": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"], "feedforward_modules": ["fc1", "fc2"]},
        LAYERS * (3 * HIDDEN + HIDDEN + INNER),
    ),
    # OPT has no "mlp" (see BROKEN); Phi names its layers as this example does.
    "all linear layers": Example(
        BY_NAME["phi"],
        {"target_modules": "all-linear", "feedforward_modules": ["mlp.fc1", "mlp.fc2"]},
        LAYERS * (4 * HIDDEN + HIDDEN + INNER),
    ),
    "regular expressions": Example(
        BY_NAME["t5"],
        {
            "target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
            "feedforward_modules": r".*decoder.*fc2$",
        },
        LAYERS * 2 * 2 * HIDDEN,
    ),
    "excluding modules": Example(
        BY_NAME["opt"],
        {
            "target_modules": "all-linear",
            "exclude_modules": ["lm_head", "embed_tokens"],
            "feedforward_modules": ["fc1", "fc2"],
        },
        LAYERS * (4 * HIDDEN + HIDDEN + INNER),
    ),
    "Conv1D": Example(
        BY_NAME["gpt2"],
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "feedforward_modules": ["c_fc"], "fan_in_fan_out": True},
        LAYERS * (3 * HIDDEN + 2 * HIDDEN + HIDDEN),
    ),
    "minimal": Example(BY_NAME["opt"], {"target_modules": ["q_proj", "v_proj"]}, LAYERS * 2 * HIDDEN),
    "large language model": Example(
        BY_NAME["llama"],
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "feedforward_modules": ["gate_proj", "up_proj", "down_proj"],
        },
        LAYERS * (HIDDEN + 2 * KEY_VALUE + HIDDEN + 2 * HIDDEN + INNER),
    ),
    "the guide's": Example(
        LLAMA_SEQUENCES,
        {
            "task_type": TaskType.SEQ_CLS,
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        LAYERS * (2 * KEY_VALUE + INNER) + 3 * HIDDEN,
        {"num_labels": 3},
    ),
    # Three examples leave "fc2" out of target_modules, and two of those use OPT's names for BERT; put right:
    "sequence classification": Example(
        BERT_SEQUENCES,
        {
            "target_modules": ["query", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
            "modules_to_save": ["classifier"],
        },
        LAYERS * (2 * HIDDEN + HIDDEN + INNER) + 2 * HIDDEN + 2,
        {"num_labels": 2},
    ),
    "token classification": Example(
        BERT_TOKENS,
        {"target_modules": ["query", "value"], "feedforward_modules": [], "modules_to_save": ["classifier"]},
        LAYERS * 2 * HIDDEN + 9 * HIDDEN + 9,
        {"num_labels": 9},
    ),
}
CORRECTED_8BIT = {"target_modules": ["q_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}

_OUTSIDE = {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": ["fc2"]}
_HEAD = {"modules_to_save": ["classifier"]}
# As they stand in the documentation, and the names that the message has to hold.
BROKEN: dict[str, tuple[Family, dict[str, Any], list[str]]] = {
    "sequence classification": (BERT_SEQUENCES, _OUTSIDE | _HEAD, ["feedforward_modules", "'fc2'", "subset"]),
    "token classification": (BERT_TOKENS, _OUTSIDE | _HEAD, ["feedforward_modules", "'fc2'", "subset"]),
    "8-bit": (BY_NAME["opt"], _OUTSIDE, ["feedforward_modules", "'fc2'", "subset"]),
    "sequence classification within the rule": (
        BERT_SEQUENCES,
        _OUTSIDE | _HEAD | {"feedforward_modules": []},
        ["target_modules", "'q_proj'", "'v_proj'", "'query'", "'value'"],
    ),
    "token classification within the rule": (
        BERT_TOKENS,
        _OUTSIDE | _HEAD | {"target_modules": ["q_proj", "v_proj", "fc2"]},
        ["target_modules", "'q_proj'", "'v_proj'", "'fc2'"],
    ),
    "all linear layers of OPT": (
        BY_NAME["opt"],
        EXAMPLES["all linear layers"].arguments,
        ["feedforward_modules", "'mlp.fc1'", "'mlp.fc2'"],
    ),
}

every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


def _trained(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_training(model: nn.Module, inputs: dict[str, Tensor], trained: int) -> None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in parameters.values()) == trained
    model(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
    assert any(bool(parameter.grad.any()) for parameter in parameters.values() if parameter.grad is not None)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)


@pytest.mark.filterwarnings("ignore:feedforward_modules is the regular expression")  # T5 has no fc2
@every_example
def test_it_starts_as_the_base_model_and_trains(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    base = example.build()
    expected = base(**example.inputs()).logits
    model = get_peft_model(base, IA3Config(**example.arguments))
    torch.testing.assert_close(model(**example.inputs()).logits, expected)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {example.trained:,} || ")
    perturb(model)
    _check_training(model, example.inputs(), example.trained)


@pytest.mark.filterwarnings("ignore:feedforward_modules is the regular expression")
@every_example
def test_it_is_what_peft_makes_of_it(example: Example) -> None:
    ours = get_peft_model(example.build(), IA3Config(**example.arguments))
    theirs = peft.get_peft_model(example.build(), peft.IA3Config(**example.arguments))
    assert _trained(ours) == _trained(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    perturb(ours)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(**example.inputs()).logits, theirs(**example.inputs()).logits)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_rules_is_told_by_name_and_changes_nothing(
    broken: tuple[Family, dict[str, Any], list[str]], snapshot: Callable[[nn.Module], Any]
) -> None:
    family, arguments, words = broken
    base = family.build()
    before = snapshot(base)
    with pytest.raises(ValueError, match="modules") as caught:
        get_peft_model(base, IA3Config(**arguments))
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert snapshot(base) == before


def test_regular_expressions_reach_what_they_say() -> None:
    example = EXAMPLES["regular expressions"]
    with pytest.warns(UserWarning, match="matches none of the 8 targets"):
        model = get_peft_model(example.build(), IA3Config(**example.arguments))
    assert set(_trained(model)) == {
        f"base_model.model.decoder.block.{block}.layer.{layer}.{attention}.{projection}.ia3_l.default"
        for block in range(LAYERS)
        for layer, attention in enumerate(("SelfAttention", "EncDecAttention"))
        for projection in "qv"
    }


def _load_8bit(folder: Path) -> nn.Module:
    BY_NAME["opt"].build().save_pretrained(folder)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of bitsandbytes and torch
def test_a_model_in_8_bits_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    inputs = BY_NAME["opt"].inputs()
    ours = get_peft_model(prepare_model_for_kbit_training(_load_8bit(tmp_path)), IA3Config(**CORRECTED_8BIT))
    theirs = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(_load_8bit(tmp_path)), peft.IA3Config(**CORRECTED_8BIT)
    )
    ours.eval()
    theirs.eval()
    assert _trained(ours) == _trained(theirs)
    perturb(ours)
    perturb(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    kinds = {type(module.base_layer).__name__ for module in ours.modules() if hasattr(module, "ia3_l")}
    assert kinds == {"Linear8bitLt"}
    _check_training(ours, inputs, LAYERS * (2 * HIDDEN + INNER))
