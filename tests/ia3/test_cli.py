"""The command line: parsing, errors, and what it says."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ia3.cli.app import NOISE, main

from .commands import process, sentence

pytestmark = pytest.mark.usefixtures("command_environment")


def test_help_needs_no_torch() -> None:
    script = "import sys; from ia3.cli.app import main; main(['finetune', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--target-modules" in done.stdout


def test_the_version_needs_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ia3-kernels ")


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
        (["finetune", "m", "d", "-o", "o", "--dtype", "int4"], "'int4' is not one of auto, bfloat16, float16, float32"),
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
    (fastest,) = [line for line in out.splitlines() if "fastest dtype" in line]
    assert "float" in fastest


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


def test_a_process_of_its_own_says_nothing_else(tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    """Of all packages that are imported on the way, quantization packages included."""
    done = process("generate", tiny_model, "--prompt", "a", "--max-new-tokens", 2, "--adapter", trained)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    done = process("generate", tiny_model, "--prompt", "a", "--adapter", tmp_path / "broken")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "broken" in line


def test_only_the_lines_that_are_named_are_kept_quiet(caplog: pytest.LogCaptureFixture) -> None:
    main(["--version"])
    for name, words in NOISE.items():
        logger = logging.getLogger(name)
        record = logger.makeRecord(name, logging.WARNING, "", 0, f"about {words} here", (), None)
        assert not logger.filter(record)
        record = logger.makeRecord(name, logging.WARNING, "", 0, "something else", (), None)
        assert logger.filter(record)
