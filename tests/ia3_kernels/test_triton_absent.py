"""Where Triton's kernels cannot run: a sentence to who asks for them by name, and other backends for who does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CALL = "import torch, ia3_kernels as k; print(k.scaled_activation(torch.ones(2, 2), torch.ones(2), 'identity').sum())"
NO_TRITON = "import sys; sys.modules['triton'] = None\n"
OLD_TRITON = (
    "import sys, types; old = types.ModuleType('triton'); old.__version__ = '3.3.1'; sys.modules['triton'] = old\n"
)
# A GPU that torch can use, as far as the choice of a backend asks.
WITH_GPU = "import torch; torch.cuda.is_available = lambda: True\n"

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("preparation", "environment", "message"),
    [
        pytest.param("", {}, "but there is no GPU that torch can use", marks=needs_no_gpu, id="no GPU"),
        pytest.param(NO_TRITON + WITH_GPU, {}, "but Triton cannot be imported", id="GPU, no Triton"),
        pytest.param(OLD_TRITON + WITH_GPU, {}, "but Triton is 3.3.1, and the kernels need 3.4", id="GPU, old Triton"),
        pytest.param(NO_TRITON, {"TRITON_INTERPRET": "1"}, "but Triton cannot be imported", id="no Triton"),
        pytest.param(OLD_TRITON, {"TRITON_INTERPRET": "1"}, "but Triton is 3.3.1, and the kernels", id="old Triton"),
    ],
)
def test_asked_for_by_name_it_says_what_is_missing(preparation: str, environment: dict[str, str], message: str) -> None:
    done = _run(preparation + CALL, IA3_BACKEND="triton", **environment)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: ia3_kernels: the backend 'triton' was asked for by name, ")
    assert message in last


@pytest.mark.parametrize(
    ("preparation", "interpreted"),
    [(NO_TRITON, "0"), (NO_TRITON, "1"), (OLD_TRITON + WITH_GPU, "0")],
    ids=["no Triton", "no Triton to interpret with", "GPU, old Triton"],
)
def test_the_automatic_choice_works_without_it(preparation: str, interpreted: str) -> None:
    done = _run(preparation + CALL, TRITON_INTERPRET=interpreted)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tensor(4.)"
    assert "triton" not in done.stderr.lower()


def test_the_automatic_choice_for_a_gpu_without_triton_warns_once() -> None:
    code = (
        NO_TRITON
        + WITH_GPU
        + (
            "import torch\n"
            "from ia3_kernels import backends\n"
            "for op in ('scaled_linear', 'gated_activation'):\n"
            "    print(backends.choose(op, 'cuda', torch.bfloat16)[0].name)"
        )
    )
    done = _run(code)
    assert done.stdout.split() == ["reference", "reference"], done.stderr
    assert done.stderr.count("running the slower torch reference because") == 1
    assert "Triton cannot be imported" in done.stderr


def test_what_it_does_not_run_is_said() -> None:
    code = (
        "import torch, ia3_kernels as k\n"
        "for x, weight in ((torch.ones(2, 3).double(), torch.ones(4, 3).double()),\n"
        "                  (torch.ones(2, 3), torch.ones(4, 3, device='meta')),\n"
        "                  (torch.ones(2, 3, device='meta'), torch.ones(4, 3))):\n"
        "    try:\n"
        "        k.scaled_linear(x, weight)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    done = _run(code, IA3_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    dtype, weight, x = done.stdout.strip().splitlines()
    assert dtype.startswith("scaled_linear: the backend 'triton' was asked for by IA3_BACKEND, but it has no float64")
    assert weight == "scaled_linear: weight is on meta, but x is on cpu; move one of them."
    assert x == "scaled_linear: weight is on cpu, but x is on meta; move one of them."


@needs_no_gpu
def test_a_wrong_route_is_said() -> None:
    code = "from torch import ones; import ia3_kernels as k; k.scaled_linear(ones(2, 3), ones(4, 3), None, ones(3))"
    done = _run(code, IA3_BACKEND="triton", TRITON_INTERPRET="1", IA3_GPU_MATMUL="fast")
    assert "IA3_GPU_MATMUL is 'fast'; expected auto, library, triton or cuda." in done.stderr.strip().splitlines()[-1]
