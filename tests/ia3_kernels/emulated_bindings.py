"""The CUDA backend on CPU tensors: the native library with the emulated kernels in place of the compiled ones.

A call takes the whole way that it takes on a GPU: fast path or dispatcher, checks, autograd, csrc/torch/cuda.cpp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from ia3_kernels import backends, target

from . import emulated

AVAILABLE = emulated.COMPILER is not None and isinstance(target.native_library(), ModuleType)


@contextmanager
def backend(monkeypatch: pytest.MonkeyPatch, matmul: str = "cuda") -> Iterator[None]:
    """Run every operator on CPU tensors by the CUDA backend; what it has no kernels for is an error."""
    library = target.native_library()
    assert isinstance(library, ModuleType)
    library.cuda.load(emulated.library()._name)
    cuda = dataclasses.replace(backends.cuda.BACKEND, device_types=frozenset({"cpu"}), unavailable=lambda: None)
    monkeypatch.setattr(backends, "_BACKENDS", (cuda, backends.reference.BACKEND))
    monkeypatch.setattr(target, "cuda_problem", lambda: None)
    monkeypatch.setenv(target.GPU_MATMUL_VARIABLE, matmul)
    backends.refresh()
    yield
    monkeypatch.undo()
    backends.refresh()
