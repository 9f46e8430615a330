"""The same tests in processes of their own: other instruction sets, other matmul routes, no native library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ia3_kernels import target

from .helpers import needs_native

ROOT = Path(__file__).resolve().parents[2]
_library = target.native_library()
_ISAS = _library.available_isas()[1:] if isinstance(_library, ModuleType) else []


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH: the packages as this process imports them, installed or not
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _pytest(*arguments: str, **environment: str) -> None:
    done = _run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_native
@pytest.mark.parametrize("isa", _ISAS)
def test_every_instruction_set(isa: str) -> None:
    _pytest("tests/ia3_kernels/test_operators.py", "-k", "native and not bits_range", IA3_CPU_ISA=isa)
    # All give the reference's bits, so all give the same.
    chosen = "kernels_and_reference_agree or worst_of_two or layouts or safe_merging"
    _pytest("tests/ia3_kernels/test_exact.py", "-k", chosen, IA3_CPU_ISA=isa)


@needs_native
@pytest.mark.parametrize("route", ["widen", "library"])
def test_both_matmul_routes(route: str) -> None:
    tests = ["tests/ia3_kernels/test_operators.py", "tests/ia3_kernels/test_gradients.py"]
    _pytest(*tests, "-k", "scaled_linear and not reference and not emulated", IA3_CPU_MATMUL=route)


@needs_native
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("IA3_CPU_ISA", "sse9", "IA3_CPU_ISA is 'sse9'; this processor runs"),
        (
            "IA3_BACKEND",
            "tpu",
            "there is no backend 'tpu'; expected one of 'native', 'cuda', 'triton', 'reference', or 'auto'",
        ),
        ("IA3_CPU_MATMUL", "magic", "IA3_CPU_MATMUL is 'magic'; expected auto, widen or library"),
    ],
)
def test_a_wrong_environment_variable_fails_loudly(variable: str, value: str, message: str) -> None:
    code = (
        "import torch, ia3_kernels as k\n"
        "x = torch.ones(40, 8).bfloat16().requires_grad_()\n"
        "k.scaled_linear(x, torch.ones(8, 8).bfloat16())"
    )
    done = _run("-c", code, **{variable: value})
    assert done.returncode != 0
    assert message in done.stderr


_WITHOUT_LIBRARY = "import sys; sys.modules['ia3_kernels._C'] = None\n"


def test_without_the_native_library_everything_runs_and_says_so_once() -> None:
    code = _WITHOUT_LIBRARY + (
        "import torch, ia3_kernels as k\n"
        "x = torch.randn(3, 8, requires_grad=True); s = torch.ones(8, requires_grad=True)\n"
        "k.gated_activation(x, x, s).sum().backward()\n"
        "k.scaled_linear(x, torch.randn(4, 8), None, s).sum().backward()\n"
        "k.scale_weight_(torch.randn(4, 8), torch.ones(8), 1)\n"
        "print(k.explain('scaled_linear').backend, 'not built' in k.target.describe()['native library'])"
    )
    done = _run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reference", "True"]
    assert done.stderr.count("running the slower torch reference") == 1


def test_a_backend_asked_for_by_name_fails_loudly_where_it_cannot_run() -> None:
    code = _WITHOUT_LIBRARY + "import torch, ia3_kernels as k; k.scaled_activation(torch.ones(2, 2))"
    done = _run("-c", code, IA3_BACKEND="native")
    assert done.returncode != 0
    assert "the backend 'native' was asked for by name, but the native library is not built" in done.stderr


def test_the_reference_can_be_asked_for_by_name() -> None:
    code = "import ia3_kernels as k; print(k.explain('scaled_linear'))"
    done = _run("-c", code, IA3_BACKEND="reference")
    assert "asked for by IA3_BACKEND=reference" in done.stdout, done.stderr


@needs_native
def test_a_cuda_library_that_does_not_fit_is_said_and_harms_nothing(tmp_path: Path) -> None:
    """Beside the native library there may be one that is damaged, or of another version."""
    damaged = tmp_path / "libia3_cuda.so"
    damaged.write_text("no library")
    code = (
        "import pathlib, torch, ia3_kernels as k\n"
        f"pathlib.Path.glob = lambda folder, pattern: iter([pathlib.Path({str(damaged)!r})])\n"
        "print(k.target.cuda_problem())\n"
        "print(k.scaled_activation(torch.ones(2), None, 'relu').sum())"
    )
    done = _run("-c", code)
    problem, total = done.stdout.splitlines()
    assert problem.startswith(f"ia3_kernels: {damaged} cannot be loaded: ")
    assert problem.endswith("build the package again.")
    assert total == "tensor(2.)"
