"""`ia3 generate --requests`: results in the order of the requests, and none that spoils another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import ia3
from ia3.cli import main

QUICK = ("--dtype", "float32", "--device", "cpu", "--max-new-tokens", "6", "--batch-size", "3")


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one kind and one of other targets, far from ones; a damaged one, and a folder that is none."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(3)
    model = ia3.get_peft_model(
        LlamaForCausalLM.from_pretrained(tiny_model), ia3.IA3Config(init_ia3_weights=False), "fr"
    )
    model.add_adapter("de", ia3.IA3Config(init_ia3_weights=False))
    other = ia3.IA3Config(target_modules=["q_proj", "o_proj"], feedforward_modules=["o_proj"], init_ia3_weights=False)
    model.add_adapter("other", other)
    model.save_pretrained(folder)
    (folder / "broken").mkdir()
    for file in (folder / "fr").iterdir():
        (folder / "broken" / file.name).write_bytes(
            file.read_bytes()[:-20] if "model" in file.name else file.read_bytes()
        )
    (folder / "notes").mkdir()
    return folder


def answers(
    capfd: pytest.CaptureFixture[str], model: Path, adapters: Path, file: Path, requests: list[Any], *options: str
) -> tuple[int, list[dict[str, Any]]]:
    """Writes the requests, runs the command, and reads what it says."""
    lines = [request if isinstance(request, str) else json.dumps(request) for request in requests]
    file.write_text("\n".join(lines) + "\n\n", "utf-8")
    command = ["generate", str(model), "--adapters", str(adapters), "--requests", str(file), *QUICK, *options]
    code = main(command)
    return code, [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def alone(model: Path, adapters: Path, prompt: str, adapter: str | None, tokens: int) -> str:
    base = LlamaForCausalLM.from_pretrained(model)
    running: Any = base if adapter is None else ia3.PeftModel.from_pretrained(base, adapters / adapter)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")
    output = running.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_every_request_is_answered_as_alone(
    capfd: pytest.CaptureFixture[str], tiny_model: Path, adapters: Path, tmp_path: Path
) -> None:
    wanted: list[tuple[str, str | None, int]] = [
        ("The quick brown", "fr", 6),
        ("a", None, 6),
        ("The quick brown", "de", 3),
        ("lazy dog", "other", 6),
        ("The", "de", 6),
        ("The quick brown", "other", 3),
        ("a fox", "fr", 6),
    ]
    requests = [
        {"prompt": prompt, "adapter": adapter, **({} if tokens == 6 else {"max_new_tokens": tokens})}
        for prompt, adapter, tokens in wanted
    ]
    code, found = answers(capfd, tiny_model, adapters, tmp_path / "requests.jsonl", requests)
    assert code == 0
    assert [answer["request"] for answer in found] == list(range(7))
    assert [answer["adapter"] for answer in found] == [adapter or "__base__" for _, adapter, _ in wanted]
    assert [answer["text"] for answer in found] == [alone(tiny_model, adapters, *one) for one in wanted]
    assert len({answer["text"] for answer in found}) > 4
    file = tmp_path / "answers.jsonl"
    assert answers(
        capfd, tiny_model, adapters, tmp_path / "requests.jsonl", requests,
        "--repetition-penalty", "1.3", "--output", str(file),
    ) == (0, [])  # fmt: skip
    assert len(file.read_text("utf-8").splitlines()) == 7


def test_a_bad_request_gets_its_own_error(
    capfd: pytest.CaptureFixture[str], tiny_model: Path, adapters: Path, tmp_path: Path
) -> None:
    good = {"prompt": "The quick", "adapter": "fr"}
    bad: list[tuple[Any, str]] = [
        ('{"prompt": "a"', "it is not JSON"),
        ([1], "it is a list"),
        ({"adapter": "fr"}, "its prompt is None"),
        ({"prompt": ""}, "its prompt is ''"),
        ({"prompt": "a", "adapter": "it"}, "its adapter is 'it'; expected the name of one of the 4"),
        ({"prompt": "a", "adapter": "../adapters/fr"}, "its adapter is '../adapters/fr'"),
        ({"prompt": "a", "max_new_tokens": 0}, "its max_new_tokens is 0"),
        ({"prompt": "a", "max_new_tokens": True}, "its max_new_tokens is True"),
        ({"prompt": "a", "max_tokens": 3}, "it has the field 'max_tokens'"),
        ({"prompt": "a" * 125}, "takes at most 128"),
        ({"prompt": "a", "adapter": "broken"}, "adapter_model.safetensors is damaged"),
    ]
    requests = [good, *(request for request, _ in bad), {"prompt": "The quick"}]
    code, found = answers(capfd, tiny_model, adapters, tmp_path / "requests.jsonl", requests)
    assert code == 2
    for answer, (_, said) in zip(found[1:-1], bad, strict=True):
        assert said in answer["error"]
        assert answer.keys() == {"request", "error"}
    assert found[0]["text"] == alone(tiny_model, adapters, "The quick", "fr", 6)
    assert found[-1]["text"] == alone(tiny_model, adapters, "The quick", None, 6)


def test_a_run_that_cannot_start_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, adapters: Path, tmp_path: Path
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n')
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    both = ("--adapters", adapters, "--requests", file)
    for options, said in (
        (both[:2], "belong together"),
        (both[2:], "belong together"),
        ((*both, "--prompt", "a"), "leave --prompt and --adapter out"),
        (("--prompt", "a", "-o", "x"), "--output is for"),
        ((*both[:3], tmp_path / "none"), "cannot be read"),
        ((*both[:3], tmp_path / "empty"), "is empty"),
        ((*both[:3], tmp_path / "latin"), "is not UTF-8"),
        (("--adapters", tmp_path / "none", *both[2:]), "is no folder"),
        (("--adapters", tmp_path, *both[2:]), "no sub-folder of"),
    ):
        assert main([*map(str, ["generate", tiny_model, *options])]) == 2
        assert said in capsys.readouterr().err


def test_progress_and_speed_are_told_on_stderr(tiny_model: Path, adapters: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a", "adapter": "fr"}\n')
    command = ["generate", tiny_model, "--adapters", adapters, "--requests", file, *QUICK]
    done = subprocess.run([sys.executable, "-m", "ia3", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"] == "fr"
    assert "1/1" in done.stderr
    assert "a second" in done.stderr
