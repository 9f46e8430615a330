"""Builds the native library with CMake; everything else about the distribution stands in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure and build with CMake and Ninja, then place the library where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise SystemExit(f"ia3-kernels: {tool} was not found; type: pip install {tool}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
        # IA3_CUDA and IA3_CUDA_ARCHITECTURES, as CMakeLists.txt describes them
        configure += [f"-D{name}={value}" for name, value in os.environ.items() if name.startswith("IA3_CUDA")]
        # A build folder remembers the environment that it was configured in; another environment starts afresh.
        subprocess.run([*configure, "--fresh"], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next(build.glob("_C.*")), target)
        place_cuda_kernels(build, target.parent)
        # The C interface of the CUDA kernels, for whoever has no torch
        shutil.copytree(ROOT / "csrc" / "include", target.parent / "include", dirs_exist_ok=True)

    def copy_extensions_to_source(self) -> None:
        """Place what an installation in place, or an editable one, imports from the checkout."""
        super().copy_extensions_to_source()
        place_cuda_kernels(Path(self.build_lib) / "ia3_kernels", ROOT / "ia3_kernels")


def place_cuda_kernels(source: Path, folder: Path) -> None:
    """Copy the library of CUDA kernels, where one was built; one of an earlier build goes in any case."""
    built = list(source.glob("libia3_cuda.*"))
    for stale in folder.glob("libia3_cuda.*"):
        stale.unlink()
    for library in built:
        shutil.copy2(library, folder)


def extensions() -> list[Extension]:
    """The native library, unless it is declined; a sentence where it cannot be built."""
    if os.environ.get("IA3_SKIP_NATIVE", "") not in ("", "0"):
        return []
    try:
        import torch  # noqa: F401  (its headers and libraries are what we build against)
    except ImportError:
        raise SystemExit(
            "ia3-kernels: torch, which the native kernels are built against, is not installed here; type: "
            'pip install torch==2.13.0 "setuptools>=77" cmake ninja && pip install --no-build-isolation -e .   '
            "(or set IA3_SKIP_NATIVE=1 to install without native kernels)"
        ) from None
    return [Extension("ia3_kernels._C", sources=[])]


# Without build isolation nobody else checks this, and an old version rejects pyproject.toml in forty lines.
if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"ia3-kernels: setuptools {setuptools.__version__} is installed, and 77 or newer is needed to build; type: "
        'pip install "setuptools>=77"'
    )

setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
