from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ia3_kernels import backends, target

from . import emulated_bindings

# Triton decides when it is imported whether it interprets, so these tests have a process of their own (make test).
collect_ignore = [] if target.is_interpreted() else ["test_triton_interpreted.py"]

# Where the public functions run: on the CPU, on a GPU, or on the CPU through Triton's interpreter or emulated CUDA.
PLACES = ["triton"] if target.is_interpreted() else ["cpu"]
if not target.is_interpreted():
    PLACES += ["emulated"] if emulated_bindings.AVAILABLE else []
    PLACES += ["cuda"] if torch.cuda.is_available() else []


def pytest_configure(config: pytest.Config) -> None:
    if target.is_interpreted():  # numpy's about the interpreter's own code, by the thousand
        for category in ("DeprecationWarning", "RuntimeWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{category}:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Start every test from one seed and from choices that no other test has made."""
    torch.manual_seed(0)
    yield
    backends.refresh()


@pytest.fixture(scope="session", autouse=True)
def _checked_interpreter() -> Iterator[None]:
    if target.is_interpreted():
        from . import interpreter

        with interpreter.checked():
            yield
    else:
        yield


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test in every place; a tensor that it makes without naming a device is made there."""
    if request.param == "cuda":
        with torch.device("cuda"):
            yield request.param
    elif request.param == "triton":
        monkeypatch.setenv(target.BACKEND_VARIABLE, "triton")
        backends.refresh()
        yield request.param
    elif request.param == "emulated":
        with emulated_bindings.backend(monkeypatch):
            yield request.param
    else:
        yield request.param
