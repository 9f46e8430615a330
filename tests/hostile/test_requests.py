"""Requests and options of `ia3 generate` that make no sense: each gets its own error, and no answer is lost."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from ia3.cli.app import main

from .harness import bounds, check_sentence
from .test_adapter_files import CONFIG, ESCAPE, WEIGHTS, config

DEEP = "[" * 100_000
# A line and what its answer says
LINES: list[tuple[bytes | dict[str, Any], str]] = [
    (b"{", "is not JSON"),
    (b"hello", "is not JSON"),
    (b'{"prompt": "a"}}', "is not JSON"),
    (b'{"prompt": "a"} {"prompt": "b"}', "is not JSON"),
    (b'{"prompt": "\xe9"}', "is not UTF-8"),
    (b"\xff\xfe{\0}\0", "is not UTF-8"),
    (b"\0", "is not JSON"),
    (DEEP.encode(), "nested too deeply"),
    (b'{"prompt": ' + DEEP.encode(), "nested too deeply"),
    (b'{"id": ' + b"1" * 5000 + b', "prompt": "a"}', "is not JSON"),
    (b"null", "it is a NoneType"),
    (b"[]", "it is a list"),
    (b'"text"', "it is a str"),
    (b"NaN", "it is a float"),
    (b"1e999", "it is a float"),
    ({}, "its prompt is 'None'"),
    ({"prompt": None}, "its prompt is 'None'"),
    ({"prompt": ""}, "its prompt is ''"),
    ({"prompt": 3}, "its prompt is '3'"),
    ({"prompt": ["a"]}, "expected a text"),
    ({"prompt": {"a": "x" * 100_000}}, "expected a text"),
    ({"prompt": "a" * 100_000}, "tokens, but the model takes at most"),
    ({"prompt": "\ud800"}, "."),
    ({"prompt": "a", "adapter": "none"}, "its adapter is 'none'"),
    ({"prompt": "a", "adapter": ESCAPE}, r"its adapter is '\\x1b"),
    ({"prompt": "a", "adapter": "../fr"}, "its adapter is"),
    ({"prompt": "a", "adapter": "/etc"}, "its adapter is"),
    ({"prompt": "a", "adapter": 3}, "its adapter is '3'"),
    ({"prompt": "a", "adapter": ["fr"]}, "its adapter is"),
    ({"prompt": "a", "adapter": {}}, "its adapter is"),
    ({"prompt": "a", "adapter": "x" * 100_000}, "its adapter is"),
    ({"prompt": "a", "adapter": "default"}, "its adapter is"),
    ({"prompt": "a", "adapter": "cut"}, "is damaged"),
    ({"prompt": "a", "adapter": "nan"}, "not finite"),
    ({"prompt": "a", "adapter": "lora"}, "peft_type 'LORA'"),
    ({"prompt": "a", "adapter": "slow"}, "too long"),
    ({"prompt": "a", "adapter": "other"}, "'nope'"),
    ({"prompt": "a", "adapter": "head"}, "trains whole modules"),
    ({"prompt": "a", "adapter": "nested"}, "nested too deeply"),
    ({"prompt": "a", "max_new_tokens": 0}, "its max_new_tokens is 0"),
    ({"prompt": "a", "max_new_tokens": -1}, "its max_new_tokens is -1"),
    ({"prompt": "a", "max_new_tokens": 1.5}, "its max_new_tokens is 1.5"),
    ({"prompt": "a", "max_new_tokens": "4"}, "expected a number above 0"),
    ({"prompt": "a", "max_new_tokens": True}, "its max_new_tokens is True"),
    ({"prompt": "a", "max_new_tokens": None}, "its max_new_tokens is None"),
    ({"prompt": "a", "max_new_tokens": 10**30}, "the model takes at most"),
    ({"prompt": "a", "stop": ""}, "its stop is"),
    ({"prompt": "a", "stop": [""]}, "its stop is"),
    ({"prompt": "a", "stop": [1]}, "its stop is"),
    ({"prompt": "a", "stop": {"a": 1}}, "its stop is"),
    ({"prompt": "a", ESCAPE: 1}, r"it has the field '\\x1b"),
    ({"prompt": "a", "x" * 100_000: 1}, "it has the field"),
    ({"prompt": "a", "messages": []}, "it has a prompt and messages"),
    ({"messages": []}, "is not a list of turns"),
    ({"messages": "hello"}, "is not JSON"),
    ({"messages": [1]}, "a turn without 'role'"),
    ({"messages": [{"role": "user"}]}, "a turn without 'role'"),
    ({"messages": [{"role": 1, "content": "a"}]}, "a turn without 'role'"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
]


@pytest.fixture(scope="module")
def answers(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Return the answers to a good request before every bad one, and one at the end, by their lines."""
    folder = tmp_path_factory.mktemp("requests")
    adapters = folder / "adapters"
    for name in ("fr", "cut", "nan", "lora", "slow", "other", "head", "nested", "a.b ü"):
        shutil.copytree(saved / "adapter", adapters / name)
    import torch
    from safetensors.torch import load_file, save_file

    (adapters / "cut" / WEIGHTS).write_bytes((saved / "adapter" / WEIGHTS).read_bytes()[:-9])
    tensors = load_file(adapters / "nan" / WEIGHTS)
    save_file(
        {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, adapters / "nan" / WEIGHTS
    )
    for name, content in {
        "lora": config(peft_type="LORA"),
        "slow": config(target_modules=r"(?:.|..|...)*[^\w.]", feedforward_modules=[]),
        "other": config(target_modules=["nope"], feedforward_modules=[]),
        "head": config(modules_to_save=["lm_head"]),
        "nested": DEEP.encode(),
    }.items():
        (adapters / name / CONFIG).write_bytes(content)
    good = json.dumps({"prompt": "The", "adapter": "fr", "id": "good"}).encode()
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line, _ in LINES]
    (folder / "requests").write_bytes(b"\n".join([one for line in raw for one in (good, line)] + [good]))
    out = folder / "answers"
    given = ["generate", saved / "base", "--requests", folder / "requests", "--adapters", adapters, "-o", out]
    with bounds(seconds=60, nbytes=4 << 30):
        assert main([*map(str, given), "--max-new-tokens", "2", "--dtype", "float32", "--device", "cpu"]) == 2
    found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(found) == 2 * len(LINES) + 1
    return {answer["line"]: answer for answer in found}


@pytest.mark.parametrize("number", range(len(LINES)))
def test_a_line(number: int, answers: dict[int, dict[str, Any]]) -> None:
    answer = answers[2 * number + 2]
    check_sentence(answer["error"].rstrip(".") + ".", LINES[number][1])
    assert "text" not in answer


def test_the_others_are_answered(answers: dict[int, dict[str, Any]]) -> None:
    good = [answers[2 * number + 1] for number in range(len(LINES) + 1)]
    assert {answer["adapter"] for answer in good} == {"fr"}
    assert len({answer["text"] for answer in good}) == 1


OPTIONS: list[tuple[list[str], str]] = [
    (["--temperature", "nan"], "is not in"),
    (["--temperature", "inf"], "is not in"),
    (["--temperature", "-1"], "is not in"),
    (["--temperature", "warm"], "valid number"),
    (["--temperature", "1", "--top-p", "0"], "is not in"),
    (["--temperature", "1", "--top-p", "nan"], "is not in"),
    (["--temperature", "1", "--top-k", "-1"], "is below 0"),
    (["--top-k", "5"], "it does not sample"),
    (["--max-new-tokens", "0"], "is below 1"),
    (["--max-new-tokens", "1" + "0" * 30], "takes at most"),
    (["--max-new-tokens", "1e3"], "valid integer"),
    (["--batch-size", "0"], "is below 1"),
    (["--repetition-penalty", "0"], "is not in"),
    (["--repetition-penalty", "inf"], "is not in"),
    (["--seed", "-1"], "is not in"),
    (["--seed", "4294967296"], "is not in"),
    (["--dtype", "int8"], "is not one of"),
    (["--dtype", ESCAPE], r"x1b.* is not one of"),
    (["--device", "tpu"], "is not one of"),
    (["--adapter", "/dev/null"], "is a file"),
    (["--adapter", "x" * 5000], "does not exist"),
    (["--adapters", "."], "are for --requests"),
    (["--output", "out"], "are for --requests"),
    (["--requests", "/dev/zero"], "leave --prompt out"),
    (["--" + ESCAPE], "lists what fits"),
]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_an_option(number: int, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, said = OPTIONS[number]
    with bounds(seconds=10):
        assert main(["generate", str(tiny_model), "--prompt", "a", "--dtype", "float32", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("Error:")]
    check_sentence(line, said)


FILES: dict[str, tuple[bytes | str, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \n\t\n", "is empty"),
    "mark-alone": (b"\xef\xbb\xbf", "is empty"),
    "endless": ("/dev/zero", "more than .* bytes"),
    "none": ("none", "cannot be read"),
    "folder": (".", "cannot be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_requests(name: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, said = FILES[name]
    path = tmp_path / "requests" if isinstance(content, bytes) else tmp_path / content
    if isinstance(content, bytes):
        path.write_bytes(content)
    with bounds(seconds=10, nbytes=1 << 30):
        assert main(["generate", str(tiny_model), "--requests", str(path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error:")]
    check_sentence(line, said)


@pytest.mark.parametrize("name", ["endless", "empty", "no-text"])
def test_what_is_piped_in(
    name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw: Any = open("/dev/zero", "rb") if name == "endless" else io.BytesIO(b"\xff" if name == "no-text" else b"")  # noqa: SIM115
    with raw, monkeypatch.context() as patch, bounds(seconds=20, nbytes=2 << 30):
        patch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
        assert main(["generate", str(tiny_model)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error:")]
    check_sentence(line, {"endless": "is longer", "empty": "is empty", "no-text": "is not text"}[name])
