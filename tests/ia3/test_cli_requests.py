"""`ia3 generate --requests`: answers as they come, by line and id, and none that spoils another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import ia3
from ia3.cli import answers as answering
from ia3.cli.app import main

from .commands import TEMPLATE, process

pytestmark = pytest.mark.usefixtures("command_environment")
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
    capfd: pytest.CaptureFixture[str], model: Path, file: Path, requests: list[Any], *options: object
) -> tuple[int, list[dict[str, Any]]]:
    """Write the requests, run the command, and read what it says, in the order of the lines."""
    lines = [request if isinstance(request, bytes) else json.dumps(request).encode() for request in requests]
    file.write_bytes(b"\n".join(lines) + b"\n\n")
    code = main([*map(str, ["generate", model, "--requests", file, *QUICK, *options])])
    found = [json.loads(line) for line in capfd.readouterr().out.split("\n") if line]
    return code, sorted(found, key=lambda answer: answer["line"])


def alone(model: Path, adapters: Path, prompt: str, adapter: str | None, tokens: int) -> str:
    base = LlamaForCausalLM.from_pretrained(model)
    running: Any = base if adapter is None else ia3.PeftModel.from_pretrained(base, adapters / adapter)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
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
        {
            "prompt": prompt,
            "adapter": adapter,
            "id": f"n{number}",
            **({} if tokens == 6 else {"max_new_tokens": tokens}),
        }
        for number, (prompt, adapter, tokens) in enumerate(wanted)
    ]
    both = ("--adapters", adapters)
    code, found = answers(capfd, tiny_model, tmp_path / "requests.jsonl", requests, *both)
    assert code == 0
    assert [answer["line"] for answer in found] == list(range(1, 8))
    assert [answer["id"] for answer in found] == [request["id"] for request in requests]
    assert [answer["adapter"] for answer in found] == [adapter or "__base__" for _, adapter, _ in wanted]
    assert [answer["text"] for answer in found] == [alone(tiny_model, adapters, *one) for one in wanted]
    assert len({answer["text"] for answer in found}) > 4
    file = tmp_path / "answers.jsonl"
    more = ("--repetition-penalty", "1.3", "--output", file)
    assert answers(capfd, tiny_model, tmp_path / "requests.jsonl", requests, *both, *more) == (0, [])
    assert len(file.read_text("utf-8").splitlines()) == 7


def test_requests_need_no_adapters(
    capfd: pytest.CaptureFixture[str], tiny_model: Path, adapters: Path, tmp_path: Path
) -> None:
    """They are for the base model then, or for the one adapter."""
    requests = [{"prompt": "The quick"}, {"prompt": "lazy", "adapter": "fr"}]
    for options, name in (((), None), (("--adapter", adapters / "fr"), "fr")):
        code, found = answers(capfd, tiny_model, tmp_path / "requests.jsonl", requests, *options)
        assert code == 2
        assert found[0]["text"] == alone(tiny_model, adapters, "The quick", name, 6)
        assert "expected none without --adapters" in found[1]["error"]


def test_an_adapter_folder_may_have_any_name(
    capfd: pytest.CaptureFixture[str], tiny_model: Path, adapters: Path, tmp_path: Path
) -> None:
    names = ("__base__", "layers0", "a.b c", "default")
    for name in names:
        shutil.copytree(adapters / "fr", tmp_path / "adapters" / name)
    requests = [{"prompt": "The quick", "adapter": name} for name in names]
    options = ("--adapters", tmp_path / "adapters")
    code, found = answers(
        capfd, tiny_model, tmp_path / "requests.jsonl", [*requests, {"prompt": "The quick"}], *options
    )
    assert code == 0
    expected = [alone(tiny_model, adapters, "The quick", name, 6) for name in ("fr", None)]
    assert [answer["text"] for answer in found] == [expected[0]] * 4 + [expected[1]]


def test_a_bad_request_gets_its_own_error(
    capfd: pytest.CaptureFixture[str], tiny_model: Path, adapters: Path, tmp_path: Path
) -> None:
    good = {"prompt": "The quick", "adapter": "fr"}
    bad: list[tuple[Any, str]] = [
        (b'{"prompt": "a"', "it is not JSON"),
        (b'{"prompt": "\xe9"}', "it is not UTF-8"),
        (b"[" * 100_000, "it is nested too deeply"),
        ([1], "it is a list"),
        ({"adapter": "fr"}, "its prompt is 'None'"),
        ({"prompt": ""}, "its prompt is ''"),
        ({"prompt": "a", "adapter": "it"}, "its adapter is 'it'; expected the name of one of the 4"),
        ({"prompt": "a", "adapter": "../adapters/fr"}, "its adapter is '../adapters/fr'"),
        ({"prompt": "a", "adapter": ["fr"]}, "its adapter is"),
        ({"prompt": "a", "max_new_tokens": 0}, "its max_new_tokens is 0"),
        ({"prompt": "a", "max_new_tokens": True}, "its max_new_tokens is True"),
        ({"prompt": "a", "max_tokens": 3}, "it has the field 'max_tokens'"),
        ({"prompt": "a", "stop": [""]}, "its stop is"),
        ({"prompt": "a", "messages": []}, "it has a prompt and messages"),
        ({"messages": [{"role": "user"}]}, "a turn without 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no chat template"),
        ({"prompt": "a" * 125}, "takes at most 128"),
        ({"prompt": "a", "adapter": "broken"}, "adapter_model.safetensors is damaged"),
    ]
    requests = [good, *(request for request, _ in bad), {"prompt": "The quick"}]
    code, found = answers(capfd, tiny_model, tmp_path / "requests.jsonl", requests, "--adapters", adapters)
    assert code == 2
    for answer, (_, said) in zip(found[1:-1], bad, strict=True):
        assert said in answer["error"]
        assert answer.keys() == {"line", "error"}
    assert found[0]["text"] == alone(tiny_model, adapters, "The quick", "fr", 6)
    assert found[-1]["text"] == alone(tiny_model, adapters, "The quick", None, 6)


def test_a_request_that_fails_in_its_batch_loses_no_other(
    capfd: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = answering.generate

    def failing(model: Any, tokenizer: Any, prompts: Any, *arguments: Any, **more: Any) -> Any:
        if any(tokenizer.decode(tokens) == "bad" for tokens in prompts):
            raise RuntimeError("probability tensor contains nan")
        return run(model, tokenizer, prompts, *arguments, **more)

    monkeypatch.setattr(answering, "generate", failing)
    requests = [{"prompt": prompt, "id": number} for number, prompt in enumerate(("one", "bad", "two"))]
    code, found = answers(capfd, tiny_model, tmp_path / "requests.jsonl", requests)
    assert code == 2
    assert found[1] == {"line": 2, "id": 1, "error": "RuntimeError: probability tensor contains nan"}
    assert all("text" in found[number] for number in (0, 2))


def test_lines_end_at_newlines_alone(capfd: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    """Numbers count blank lines, a byte-order mark is no part of the first, and what splitlines() splits at stays."""
    lines = [
        b"\xef\xbb\xbf" + b'{"prompt": "a"}\r',
        b"",
        b"  ",
        '{"prompt": "b\u2028\u0085c", "id": null}'.encode(),
        b"{",
    ]
    code, found = answers(capfd, tiny_model, tmp_path / "requests.jsonl", lines)
    assert code == 2
    assert [answer["line"] for answer in found] == [1, 4, 5]
    assert ["id" in answer for answer in found] == [False, True, False]
    assert ["text" in answer for answer in found] == [True, True, False]


def test_requests_stop_where_they_say(capfd: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    whole = answers(capfd, tiny_model, tmp_path / "requests.jsonl", [{"prompt": "The q"}])[1][0]["text"]
    requests = [{"prompt": "The q", "stop": whole[2:4]}, {"prompt": "The q", "stop": [whole[1:3], "none"]}]
    code, found = answers(capfd, tiny_model, tmp_path / "requests.jsonl", [*requests, {"prompt": "The q"}])
    assert code == 0
    expected = [whole[: whole.find(whole[2:4])], whole[: whole.find(whole[1:3])], whole]
    assert [answer["text"] for answer in found] == expected


def test_a_chat_goes_through_the_template(
    capfd: pytest.CaptureFixture[str], chat_model: Path, adapters: Path, tmp_path: Path
) -> None:
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "The q"}]
    requests = [{"messages": turns}, {"prompt": "The q"}]
    code, found = answers(capfd, chat_model, tmp_path / "requests.jsonl", requests)
    assert code == 0
    assert "<{{ turn.role }}>" in TEMPLATE
    expected = ["<system>x</><user>The q</><assistant>", "<user>The q</><assistant>"]
    assert [answer["text"] for answer in found] == [alone(chat_model, adapters, text, None, 6) for text in expected]


def test_answers_are_written_as_they_come(
    capfd: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is answered is in the file when the next batch begins; whatever ends the run there takes none of it."""
    file = tmp_path / "answers.jsonl"
    run = answering.generate
    seen: list[int] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        seen.append(len(file.read_text().splitlines()) if file.exists() else 0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return run(*arguments, **more)

    monkeypatch.setattr(answering, "generate", watched)
    requests: list[Any] = [b"{", *({"prompt": "a"} for _ in range(3))]
    code, _ = answers(capfd, tiny_model, tmp_path / "requests.jsonl", requests, "-o", file, "--batch-size", 1)
    assert code == 130
    assert seen == [1, 2, 3]
    assert len(file.read_text().splitlines()) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "requests.jsonl"}


def test_a_run_that_cannot_start_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, adapters: Path, tmp_path: Path
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n')
    (tmp_path / "empty").write_text("\n \n")
    both = ("--adapters", adapters, "--requests", file)
    for options, said in (
        (both[:2], "are for --requests"),
        (("--prompt", "a", "-o", "x"), "are for --requests"),
        ((*both, "--prompt", "a"), "leave --prompt out"),
        ((*both, "--adapter", adapters / "fr"), "one of --adapter and --adapters"),
        ((*both[:3], tmp_path / "none"), "cannot be read"),
        ((*both[:3], tmp_path / "empty"), "is empty"),
        (("--adapters", tmp_path / "none", *both[2:]), "is no folder"),
        (("--adapters", tmp_path, *both[2:]), "no sub-folder of"),
        ((*both, "-o", tmp_path), "is a folder"),
    ):
        assert main([*map(str, ["generate", tiny_model, *options])]) == 2
        assert said in capsys.readouterr().err


def test_progress_and_speed_are_told_on_stderr(tiny_model: Path, adapters: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a", "adapter": "fr"}\n')
    done = process("generate", tiny_model, "--adapters", adapters, "--requests", file, *QUICK)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"] == "fr"
    assert "1/1" in done.stderr
    assert "a second" in done.stderr
