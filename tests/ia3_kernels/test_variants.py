"""The same tests in processes of their own: other instruction sets, other matmul routes, no native library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ia3_kernels import backends, target

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
    files = [f"tests/ia3_kernels/test_exact{part}.py" for part in ("", "_errors")]
    _pytest(*files, "-k", chosen, IA3_CPU_ISA=isa)


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


def test_without_the_native_library_other_derivatives_are_refused() -> None:
    code = _WITHOUT_LIBRARY + (
        "import torch, ia3_kernels as k\n"
        "x = torch.randn(3, 8, requires_grad=True); s = torch.ones(8)\n"
        "def said(function):\n"
        "    try: function()\n"
        "    except RuntimeError as error: print(str(error).splitlines()[0])\n"
        "(g,) = torch.autograd.grad(k.scaled_activation(x, s).sum(), x, create_graph=True)\n"
        "said(lambda: g.sum().backward())\n"
        "said(lambda: torch.func.jvp(lambda x: k.scaled_linear(x, x, None, s), (x,), (x,)))\n"
        "said(lambda: torch.func.jvp(lambda x: torch.ops.ia3.scale_pair(x, s, s), (x,), (x,)))"
    )
    done = _run("-c", code)
    assert done.returncode == 0, done.stderr
    twice, linear, pair = done.stdout.splitlines()
    assert twice.startswith("scaled_activation: second-order gradients are not implemented")
    assert linear.startswith("scaled_linear: forward-mode derivatives")
    assert pair.startswith("scale_pair: forward-mode derivatives")


@needs_native
@pytest.mark.parametrize("change", ["an argument more", "an operator more"])
def test_a_native_library_of_other_sources_is_said_and_not_used(tmp_path: Path, change: str) -> None:
    shutil.copytree(Path(target.__file__).parent, tmp_path / "ia3_kernels")
    schemas = tmp_path / "ia3_kernels" / "schemas.py"
    line = '"scale_pair": "(Tensor x, Tensor first, Tensor second'
    other = {
        "an argument more": f"{line}, int more",
        "an operator more": f'"scale_triple": "(Tensor x) -> Tensor",\n    {line}',
    }[change]
    schemas.write_text(schemas.read_text("utf-8").replace(line, other, 1), "utf-8")
    code = "import torch, ia3_kernels as k; print(k.__file__, k.scaled_activation(torch.ones(2), None, 'relu').sum())"
    paths = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path and path != str(ROOT))])
    done = _run("-P", "-c", code, PYTHONPATH=paths)
    assert "built from other sources than the Python files beside it" in done.stderr, done.stderr
    if change == "an argument more":  # found before anything is registered
        assert done.stdout.split() == [str(tmp_path / "ia3_kernels" / "__init__.py"), "tensor(2.)"], done.stderr
        assert "running the slower torch reference" in done.stderr
    else:
        assert done.returncode == 1
        assert "lacks scale_triple; build the package again" in done.stderr


def test_variables_are_read_at_the_choice_and_again_after_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, read, value in (
        (target.BACKEND_VARIABLE, target.requested_backend, "reference"),
        (target.GPU_MATMUL_VARIABLE, target.gpu_matmul, "library"),
    ):
        assert read() == "auto"
        monkeypatch.setenv(variable, value)
        assert read() == "auto"
        backends.refresh()
        assert read() == value


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
