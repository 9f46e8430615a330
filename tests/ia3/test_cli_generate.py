"""`ia3 generate`: continuations of prompts, and what keeps them from being written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from ia3.cli.app import main

from .commands import finetune, sentence

pytestmark = pytest.mark.usefixtures("command_environment")


def test_generate_goes_on_from_every_prompt(capfd: pytest.CaptureFixture[str], tiny_model: Path, trained: Path) -> None:
    command = ["generate", str(tiny_model), "--prompt", "The q", "--prompt", "lazy", "--max-new-tokens", "5"]
    outputs = []
    for options in ([], ["--adapter", str(trained)], ["--adapter", str(trained)]):
        assert main([*command, *options]) == 0
        outputs.append(capfd.readouterr().out)
    plain, adapted, again = outputs
    assert adapted.startswith("The q")
    assert "\n\nlazy" in adapted
    assert adapted == again
    assert adapted != plain


def test_generate_reads_a_prompt_from_a_pipe_and_samples_by_seed(
    capfd: pytest.CaptureFixture[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outputs = []
    (tmp_path / "prompt").write_text("The quick\n", encoding="utf-8")
    for seed in ("1", "1", "2"):
        with (tmp_path / "prompt").open(encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            options = ("--temperature", "1.5", "--max-new-tokens", "12", "--no-echo", "--seed", seed)
            assert main(["generate", str(tiny_model), *options]) == 0
        outputs.append(capfd.readouterr().out)
    first, again, other = outputs
    assert first == again
    assert first != other
    assert "The quick" not in first


def test_generate_says_what_does_not_fit(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "a")
    assert "the prompt is empty" in sentence(capsys, ["generate", tiny_model, "--prompt", ""])
    assert "takes at most 128" in sentence(capsys, ["generate", tiny_model, *prompt, "--max-new-tokens", 128])
    assert "does not exist" in sentence(capsys, ["generate", tiny_model, *prompt, "--adapter", tmp_path / "none"])
    if not torch.cuda.is_available():
        assert "no CUDA device" in sentence(capsys, ["generate", tiny_model, *prompt, "--device", "cuda"])


@pytest.mark.parametrize("damage", ["config", "weights", "truncated", "half a config"])
def test_a_half_written_adapter_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, trained: Path, tmp_path: Path, damage: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    config, weights = broken / "adapter_config.json", broken / "adapter_model.safetensors"
    if damage == "config":
        config.unlink()
    elif damage == "weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config.write_text(config.read_text()[:50])
    assert "broken" in sentence(capsys, ["generate", tiny_model, "--prompt", "a", "--adapter", broken])


def test_a_model_that_cannot_be_loaded_is_named(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, trained: Path, tmp_path: Path
) -> None:
    def said(path: Path) -> str:
        return sentence(capsys, ["generate", path, "--prompt", "a"])

    assert "does not exist" in said(tmp_path / "none")
    assert "no config.json" in said(tmp_path)
    assert "is an adapter, not a model" in said(trained)
    (tmp_path / "model.gguf").write_bytes(b"GGML and more")
    assert "is not a GGUF file" in said(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and no more")
    assert "cannot be loaded" in said(tmp_path / "model.gguf")
    for name, lost, expected in (
        ("a", "tokenizer*", "tokenizer"),
        ("b", "*.safetensors", "cannot be loaded"),
    ):
        shutil.copytree(tiny_model, tmp_path / name)
        for path in (tmp_path / name).glob(lost):
            path.unlink()
        assert expected in said(tmp_path / name)
    shutil.copytree(tiny_model, tmp_path / "c")
    weights = tmp_path / "c" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in said(tmp_path / "c")
    shutil.copytree(tiny_model, tmp_path / "d")
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "lacks 9 of the model's weights" in said(tmp_path / "d")


def continuation(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_an_instruct_model_is_prompted_with_its_template(
    capfd: pytest.CaptureFixture[str], chat_model: Path, tmp_path: Path
) -> None:
    """Unless that is declined, or the adapter was trained on plain text."""
    command = ["generate", str(chat_model), "--prompt", "The q", "--max-new-tokens", "6", "--dtype", "float32"]
    outputs = []
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 80)
    (tmp_path / "chat.jsonl").write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
            for _ in range(10)
        )
    )
    for name in ("text.txt", "chat.jsonl"):
        assert finetune(chat_model, tmp_path / name, tmp_path / name[:4], "--lr", 1e-9) == 0
    capfd.readouterr()
    for options in ([], ["--no-chat"], ["--adapter", f"{tmp_path}/text"], ["--adapter", f"{tmp_path}/chat"]):
        assert main([*command, *options]) == 0
        outputs.append(capfd.readouterr().out)
    chat = continuation(chat_model, "<user>The q</><assistant>", 6)
    plain = continuation(chat_model, "The q", 6)
    assert chat != plain
    assert [text.removesuffix("\n") for text in outputs] == [chat, "The q" + plain, "The q" + plain, chat]


def test_generation_ends_before_a_stop_string(capfd: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    command = ["generate", str(tiny_model), "--prompt", "The q", "--max-new-tokens", "9", "--dtype", "float32"]
    assert main([*command, "--no-echo"]) == 0
    whole = capfd.readouterr().out.removesuffix("\n")
    assert main([*command, "--stop", "no such text", "--stop", whole[3:5]]) == 0
    assert capfd.readouterr().out.removesuffix("\n") == "The q" + whole[: whole.find(whole[3:5])]


def test_a_gguf_file_is_parsed_once_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> None:
    """Its tokenizer's class needs no configuration, for which transformers reads the whole file."""
    import transformers

    from ia3.cli import checkpoints

    def auto(*_: object, **__: object) -> None:
        raise AssertionError("AutoTokenizer was asked")

    class Fast:
        @staticmethod
        def from_pretrained(folder: str, **arguments: object) -> object:
            assert arguments["gguf_file"] == "m.gguf"
            return tokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", auto)
    monkeypatch.setattr(transformers, "PreTrainedTokenizerFast", Fast)
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    monkeypatch.setattr(checkpoints, "_load_model", lambda *_: model)
    assert checkpoints.load(checkpoints.Source(tmp_path, "m.gguf"), torch.float32, "cpu") == (tokenizer, model)
