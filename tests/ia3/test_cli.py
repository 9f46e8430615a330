"""The command line: what it writes, what it says, and that it leaves nothing half-done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import ia3
from ia3.cli import main
from ia3.cli.app import ENVIRONMENT

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
QUICK = ("--steps", "4", "--block-size", "32", "--dtype", "float32", "--device", "cpu")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets these for its process; here they must not outlive the test."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ia3 finetune` leaves."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    options = ("--steps", "12", *QUICK[2:], "--lr", "0.1")
    assert main(["finetune", str(tiny_model), str(folder / "text.txt"), "-o", str(folder / "out"), *options]) == 0
    return folder / "out"


def sentence(capsys: pytest.CaptureFixture[str], arguments: Sequence[object], code: int = 2) -> str:
    """Runs `main`, which must fail with `code`, one line of error, and nothing on stdout; returns that line.

    Other lines on stderr are notices and bars of transformers, which reads the environment that quiets them when it is
    imported, and so before `main` in this process (test_a_process_of_its_own_says_nothing_else).
    """
    assert main([*map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("Error:")]
    return line


# --- parsing -----------------------------------------------------------------------------------------------------


def test_help_needs_no_torch() -> None:
    script = "import sys; from ia3.cli import main; main(['finetune', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--target-modules" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "'train'"),
        (["finetune", "m"], "DATA"),
        (["finetune", "m", "d"], "--output"),
        (["finetune", "m", "d", "-o", "o", "--steps", "-3"], "-3 is below 1"),
        (["finetune", "m", "d", "-o", "o", "--steps", "few"], "--steps"),
        (["finetune", "m", "d", "-o", "o", "--block-size", "1"], "1 is below 2"),
        (["finetune", "m", "d", "-o", "o", "--lr", "0"], "0 is not in (0, inf)"),
        (["finetune", "m", "d", "-o", "o", "--lr", "nan"], "nan is not in (0, inf)"),
        (["finetune", "m", "d", "-o", "o", "--held-out", "1"], "1 is not in [0, 1)"),
        (["finetune", "m", "d", "-o", "o", "--dtype", "int4"], "'int4' is not one of bfloat16, float16, float32"),
        (["finetune", "m", "d", "-o", "o", "--schedule", "steep"], "'steep' is not one of constant, linear, cosine"),
        (["generate", "m", "--prompt", "a", "--temperature", "-1"], "-1 is not in [0, inf)"),
        (["generate", "m", "--prompt", "a", "--top-k", "5"], "--temperature is 0"),
        (["generate", "m", "--prompt", "a", "--device", "tpu"], "'tpu' is not one of auto, cpu, cuda"),
    ],
)
def test_wrong_arguments_are_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert said in sentence(capsys, arguments)


def test_doctor_tells_what_runs_each_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "peft", "instruction set", "reference", "scaled_linear", "gated_activation", "scale_weight_"):
        assert word in out


# --- finetune ----------------------------------------------------------------------------------------------------


def test_finetune_writes_adapter_curve_and_metrics(tiny_model: Path, adapter: Path) -> None:
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.json"}
    assert {path.name for path in adapter.iterdir()} == files
    assert {path.name for path in adapter.parent.iterdir()} == {"out", "text.txt"}
    assert (adapter / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((adapter / "metrics.json").read_text(encoding="utf-8"))
    assert len(metrics["train_loss"]) == 12
    held_out = metrics["held_out_loss"]
    assert (held_out[0]["step"], held_out[-1]["step"]) == (0, 12)
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert metrics["train_tokens"] + metrics["held_out_tokens"] == 32 * (len(TEXT) // 32)


def test_peft_loads_what_finetune_wrote(tiny_model: Path, adapter: Path) -> None:
    peft = pytest.importorskip("peft")

    tokens = torch.tensor([[5, 6, 7, 8]])
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), adapter)
    ours = ia3.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), adapter)
    plain = LlamaForCausalLM.from_pretrained(tiny_model)
    with torch.inference_mode():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, expected)
        assert not torch.allclose(plain(tokens).logits, expected, atol=1e-2)


def test_the_same_seed_gives_the_same_adapter(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command = ["finetune", tiny_model, text, "-o", tmp_path / name, *QUICK, "--seed", seed]
        assert main([*map(str, command)]) == 0
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_names_are_no_markup(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither rich's nor matplotlib's, which would fail on these."""
    data = tmp_path / "[a]$\\frac$[/b].txt"
    data.parent.mkdir()
    data.write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", str(tiny_model), str(data), "-o", "[red]", *QUICK]) == 0
    assert "[red]" in capsys.readouterr().out
    assert (tmp_path / "[red]" / "loss.png").is_file()


def test_pairs_and_adapter_options_reach_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(20)]
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = ["finetune", tiny_model, data, "-o", tmp_path / "out", *QUICK, "--held-out", "0", "--accumulation", "2"]
    targets = ["--target-modules", "re:.*layers\\.0\\..*(q|down)_proj", "--feedforward-modules", "re:.*down_proj"]
    assert main([*map(str, command), *targets, "--random-init"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ".*layers\\.0\\..*(q|down)_proj"
    assert config["init_ia3_weights"] is False
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["trainable_parameters"] == 32 + 64
    assert metrics["held_out_loss"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target-modules", "no_such_proj"], "no_such_proj"),
        (["--target-modules", "k_proj", "--feedforward-modules", "down_proj"], "down_proj"),
        (["--target-modules", "re:(", "--feedforward-modules", "re:("], "("),
        (["--block-size", "100000"], "too few for one sequence"),
        (["--block-size", "200"], "the model takes at most 128"),
        (["--lr", "3e38"], "--learning-rate"),
    ],
)
def test_finetune_says_what_does_not_fit_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, text: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    assert said in sentence(capsys, ["finetune", tiny_model, text, "-o", tmp_path / "out", *QUICK, *options])
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_output_that_exists_is_kept(capsys: pytest.CaptureFixture[str], tiny_model: Path, text: Path) -> None:
    assert "is not empty" in sentence(capsys, ["finetune", tiny_model, text, "-o", text.parent])
    assert "is a file" in sentence(capsys, ["finetune", tiny_model, text, "-o", text])
    assert "is a file" in sentence(capsys, ["finetune", tiny_model, text, "-o", text / "out"])


def test_finetune_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["finetune", tiny_model, text, "-o", tmp_path / "out"]
    assert "does not exist" in sentence(capsys, ["finetune", tiny_model, tmp_path / "none", "-o", tmp_path / "out"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert "pip install accelerate" in sentence(capsys, command)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    """The signal comes at the worst moment: while the output is being written."""

    def save(self: Any, folder: str) -> None:
        (Path(folder) / "adapter_config.json").write_text("{")
        signal.raise_signal(number)

    monkeypatch.setattr("ia3.PeftModel.save_pretrained", save)
    command = [*map(str, ["finetune", tiny_model, text, "-o", tmp_path / "out", *QUICK])]
    if number == signal.SIGINT:
        assert main(command) == code
    else:
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_bug_is_called_one(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("ia3.cli.checkpoints.locate", broken)
    command = ["generate", str(tiny_model), "--prompt", "a"]
    assert "unexpected KeyError: 'lost'" in sentence(capsys, command, code=1)
    assert main(["--traceback", *command]) == 1
    assert "Traceback" in capsys.readouterr().err


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_goes_on_from_every_prompt(capfd: pytest.CaptureFixture[str], tiny_model: Path, adapter: Path) -> None:
    command = ["generate", str(tiny_model), "--prompt", "The q", "--prompt", "lazy", "--max-new-tokens", "5"]
    outputs = []
    for options in ([], ["--adapter", str(adapter)], ["--adapter", str(adapter)]):
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
    capsys: pytest.CaptureFixture[str], tiny_model: Path, adapter: Path, tmp_path: Path, damage: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
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
    capsys: pytest.CaptureFixture[str], tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    def said(path: Path) -> str:
        return sentence(capsys, ["generate", path, "--prompt", "a"])

    assert "does not exist" in said(tmp_path / "none")
    assert "no config.json" in said(tmp_path)
    assert "is an adapter, not a model" in said(adapter)
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


def test_a_process_of_its_own_says_nothing_else(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"half")
    command = [sys.executable, "-m", "ia3", "generate", tiny_model, "--prompt", "a", "--adapter", tmp_path / "broken"]
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    # Quantization packages that transformers imports, where they are installed, may say something of their own before.
    *_, line = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "broken" in line
    assert done.stderr.count("Error: ") == 1
    assert "Traceback" not in done.stderr
