"""IA3Config: PEFT's fields and defaults, its file format, and sentences for what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ia3 import IA3Config, IA3Error, PeftType, TaskType

peft = pytest.importorskip("peft")


def test_fields_order_and_defaults_are_those_of_peft() -> None:
    ours, theirs = IA3Config().to_dict(), peft.IA3Config().to_dict()
    assert list(ours) == list(theirs)
    ours.pop("peft_version"), theirs.pop("peft_version")
    assert ours == theirs
    assert [task.value for task in TaskType] == [task.value for task in peft.TaskType]


def test_lists_become_sets_and_strings_stay() -> None:
    config = IA3Config(target_modules=["k", "v"], feedforward_modules=("v",), exclude_modules="x.*", peft_type="IA3")
    assert (config.target_modules, config.feedforward_modules) == ({"k", "v"}, {"v"})
    assert config.exclude_modules == "x.*"
    assert config.peft_type is PeftType.IA3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_modules": ["q_proj"], "feedforward_modules": ["fc2"]}, ["subset", "'fc2'", "'q_proj'"]),
        ({"target_modules": ["a", 3]}, ["target_modules", "3"]),
        ({"target_modules": "(k"}, ["target_modules", "'(k'", "regular expression"]),
        ({"modules_to_save": "classifier"}, ["modules_to_save", "['classifier']"]),
        ({"task_type": "CHAT"}, ["'CHAT'", "CAUSAL_LM"]),
        ({"fan_in_fan_out": "yes"}, ["fan_in_fan_out", "'yes'"]),
        ({"peft_type": "LORA"}, ["LORA"]),
    ],
)
def test_nonsense_is_one_sentence(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(IA3Error) as caught:
        IA3Config(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message
    assert isinstance(caught.value, ValueError)


def test_files_are_read_and_written_as_peft_does(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "task_type": "SEQ_CLS",
        "target_modules": [f"v{number}" for number in range(9, -1, -1)],  # of an order that no set has by chance
        "feedforward_modules": ["v0"],
        "modules_to_save": ["head"],
    }
    IA3Config(**arguments).save_pretrained(tmp_path / "ours")
    peft.IA3Config(**arguments).save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    names = [f"v{number}" for number in range(10)]
    assert ours["target_modules"] == names
    theirs["target_modules"].sort()
    ours.pop("peft_version"), theirs.pop("peft_version")
    assert ours == theirs
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "ours")).target_modules == set(names)
    assert IA3Config.from_pretrained(tmp_path / "theirs").to_dict() | {"peft_version": None} == (
        IA3Config(**arguments).to_dict() | {"peft_version": None}
    )


def test_unknown_fields_are_warned_about(tmp_path: Path) -> None:
    IA3Config(target_modules=["k"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_of_tomorrow": 4, "fan_in_fan_out": None}))
    with pytest.warns(UserWarning, match="rank_of_tomorrow"):
        config = IA3Config.from_pretrained(tmp_path)
    assert config.target_modules == {"k"}
    assert config.fan_in_fan_out is False  # as PEFT reads null


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "JSON"), ("[]", "list"), ('{"peft_type": "LORA"}', "LORA"), ('{"peft_type": "IA3", "task_type": 1}', "1")],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(IA3Error, match=word) as caught:
        IA3Config.from_pretrained(tmp_path)
    assert "adapter_config.json" in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IA3Error, match=r"no adapter_config\.json"):
        IA3Config.from_pretrained(tmp_path / "nowhere")


def test_a_subfolder_is_read(tmp_path: Path) -> None:
    IA3Config(target_modules=["k"]).save_pretrained(tmp_path / "other")
    assert IA3Config.from_pretrained(tmp_path, subfolder="other").target_modules == {"k"}
