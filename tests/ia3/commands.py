"""What the tests of the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ia3.cli.app import ENVIRONMENT, main

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
QUICK = ("--steps", "4", "--block-size", "32", "--dtype", "float32", "--device", "cpu")
# A chat template as instruction-tuned models have them; it marks turns by characters that no text here has.
TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sentence(capsys: pytest.CaptureFixture[str], arguments: Sequence[object], code: int = 2) -> str:
    """Run `main`, which must fail with `code`, one line of error, and nothing on stdout; return that line.

    Other lines on stderr are bars and notices of transformers, which reads the environment that quiets them when it is
    imported, and so before `main` in this process (test_a_process_of_its_own_says_nothing_else).
    """
    assert main([*map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("Error:")]
    return line


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as users do: in a process of its own, with nothing set in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    command = [sys.executable, "-m", "ia3", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def finetune(model: Path, data: Path, output: Path, *options: object) -> int:
    """Fine-tune quickly; later options win over QUICK's."""
    return main([*map(str, ["finetune", model, data, "-o", output, *QUICK, *options])])
