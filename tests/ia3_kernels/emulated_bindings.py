"""``csrc/torch/cuda.cpp`` around the emulated kernels: the backend ``cuda`` as Python calls it, on CPU tensors."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.utils import cpp_extension

from ia3_kernels import backends, cuda, target

from . import emulated

# In one file: torch's headers take longer to compile than all of this.
MODULE = """
#include "cuda.cpp"
#include "tensors.cpp"
PYBIND11_MODULE(emulated, m) {
  auto cuda = m.def_submodule("cuda");
  ia3::bind_cuda(cuda);
}
"""


def _compile(source: Path, folder: Path) -> Path:
    made = folder / f"{source.name}.o"
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    options = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", f"-I{emulated.ROOT / 'csrc/torch'}"]
    options += [f"-isystem{path}" for path in includes]
    command = [str(emulated.COMPILER), *options, "-c", str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@functools.cache
def module() -> ModuleType:
    """As the native library would be with CUDA, but for its other kernels; compiled once a session."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "module.cpp").write_text(MODULE)
        kernels = [*emulated.SOURCES, emulated.ROOT / "csrc/cuda/hopper_dispatch.cpp"]
        with ThreadPoolExecutor(2) as pool:
            bound = pool.submit(_compile, folder / "module.cpp", folder)
            objects = [*pool.map(lambda source: emulated.compile_source(source, folder), kernels), bound.result()]
        made = folder / "emulated.so"
        paths = cpp_extension.library_paths()
        libraries = [*(f"-L{path}" for path in paths), *(f"-Wl,-rpath,{path}" for path in paths)]
        libraries += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
        command = [str(emulated.COMPILER), "-shared", *map(str, objects), *libraries, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        specification = importlib.util.spec_from_file_location("emulated", made)
        assert specification is not None
        assert specification.loader is not None
        loaded = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(loaded)
    return loaded


@contextmanager
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[..., Any]]]:
    """The operators of the backend ``cuda``, whose own matmul runs wherever it can."""
    library = module()
    monkeypatch.setattr(target, "native_library", lambda: library)
    monkeypatch.setattr(target, "cuda_problem", lambda: None)
    monkeypatch.setattr(cuda, "_stream", lambda x: 0)
    monkeypatch.setenv(target.GPU_MATMUL_VARIABLE, "cuda")
    yield dict(backends.cuda.BACKEND.operators)
