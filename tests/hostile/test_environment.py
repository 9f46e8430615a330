"""Environment variables with nonsense: a sentence where something computes, and `ia3 doctor` runs always."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

# A variable's value, and what computing says: nothing where it is understood, or means nothing to a processor.
# What the native library has understood is chosen for the process: values of those two come first, the good ones last.
ISA: list[tuple[str, str, str]] = [
    ("IA3_CPU_ISA", "sse9", "IA3_CPU_ISA is 'sse9'; this processor runs"),
    ("IA3_CPU_ISA", "\x1b[31m", "IA3_CPU_ISA is"),
    ("IA3_CPU_ISA", "größer", "IA3_CPU_ISA is"),
    ("IA3_CPU_ISA", "x" * 50_000, "IA3_CPU_ISA is"),
    ("IA3_CPU_ISA", "plain,avx2", "IA3_CPU_ISA is"),
    ("IA3_CPU_ISA", " PLAIN ", ""),
]
OTHERS: list[tuple[str, str, str]] = [
    ("IA3_CPU_MATMUL", "magic", "IA3_CPU_MATMUL is 'magic'; expected"),
    ("IA3_CPU_MATMUL", "1", "IA3_CPU_MATMUL is '1'"),
    ("IA3_CPU_MATMUL", "\x07", "IA3_CPU_MATMUL is"),
    ("IA3_CPU_MATMUL", " Widen", ""),
    ("IA3_BACKEND", "tpu", "there is no backend 'tpu'"),
    ("IA3_BACKEND", "\x1b]0;owned", "there is no backend"),
    ("IA3_BACKEND", "x" * 50_000, "there is no backend"),
    ("IA3_BACKEND", "triton", "the backend 'triton' was asked for"),
    ("IA3_BACKEND", "cuda", "the backend 'cuda' was asked for"),
    ("IA3_BACKEND", " Native ", ""),
    ("IA3_BACKEND", "REFERENCE", ""),
    ("IA3_BACKEND", "", ""),
    ("IA3_GPU_MATMUL", "magic", ""),
    ("IA3_GPU_MATMUL", "TRITON", ""),
    ("IA3_CACHE", "/dev/null", ""),
    ("IA3_CACHE", "/proc/1/there/is/none", ""),
    ("IA3_CACHE", "x" * 50_000, ""),
    ("IA3_CACHE", "\x1b[31m", ""),
    ("XDG_CACHE_HOME", "~there-is-nobody-of-this-name/x", ""),
    ("HOME", "/there/is/none", ""),
    ("HOME", "", ""),
    ("TRITON_INTERPRET", "perhaps", ""),
    ("COLUMNS", "many", ""),
    ("COLUMNS", "-5", ""),
    ("TERM", "\x1b", ""),
    ("NO_COLOR", "x", ""),
]
_CODE = """
import io, json, os, sys, contextlib
import torch, ia3_kernels
torch.set_num_threads(1)
from ia3.cli.app import main
own = dict(os.environ)
del own[sys.argv[1]]  # it stood there when the library was loaded
for name, value, _ in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(own | {name: value})
    ia3_kernels.backends.refresh()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["doctor"])
    said = ""
    try:
        x = torch.ones(40, 8).bfloat16()
        ia3_kernels.scaled_linear(x, torch.ones(8, 8).bfloat16(), None, torch.ones(8))
    except (RuntimeError, ValueError) as error:
        said = str(error)
    print(json.dumps([code, out.getvalue(), err.getvalue(), said]), file=sys.__stdout__)
"""


@functools.cache
def outcomes(values: str) -> list[list[Any]]:
    """Return doctor's exit code and words, and what computing says, for each of these values, in one fresh process."""
    name, value, _ = json.loads(values)[0]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IA3_")} | {name: value}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, name], input=values, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("values", "number"), [(values, n) for values in (ISA, OTHERS) for n in range(len(values))])
def test_a_variable(values: list[tuple[str, str, str]], number: int) -> None:
    name, _, expected = values[number]
    code, out, err, said = outcomes(json.dumps(values))[number]
    assert code == 0, err
    assert "Traceback" not in err
    assert "ia3-kernels" in out
    assert (expected in said) if expected else said == ""
    assert len(said) < 1000
    for text in (out, said):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
    if expected:
        assert expected.split(";")[0][:20] in " ".join(out.split()) or name in out


@pytest.mark.parametrize(
    ("name", "value"), [("IA3_CPU_ISA", "AVX3"), ("IA3_BACKEND", "tpu"), ("IA3_CPU_MATMUL", "x" * 5000)]
)
def test_a_command_says_it_before_it_works(name: str, value: str, tmp_path: Any) -> None:
    code = (
        "import sys; from ia3.cli import checkpoints, boundary\n"
        "sys.exit(boundary.run(lambda: checkpoints.check_kernels('cpu'), boundary.Settings()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ | {name: value}
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert "no kernel can run" in line
    assert value[:10].lower() in line
    assert len(line) < 600
