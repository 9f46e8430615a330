"""The one module that answers questions about hardware, environment variables and versions."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
from types import ModuleType

import torch

BACKEND_VARIABLE = "IA3_BACKEND"  # auto (default), native, reference
ISA_VARIABLE = "IA3_CPU_ISA"  # auto (default), avx512, avx2, plain: read by the native library when it loads
MATMUL_VARIABLE = "IA3_CPU_MATMUL"  # auto (default), widen, library: read by the native library at first use


def requested_backend() -> str:
    """The backend that the user asks for by name, or ``auto``."""
    return os.environ.get(BACKEND_VARIABLE, "auto").strip().lower() or "auto"


@functools.cache
def native_library() -> ModuleType | ImportError:
    """The compiled extension, or the error that says why there is none."""
    try:
        library = importlib.import_module("ia3_kernels._C")
    except ImportError as error:
        return error
    # Settles the instruction set now: a wrong name in the environment is said at import, not at first use.
    library.isa()
    return library


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, str]:
    """What this machine and installation offer, as label -> sentence fragments for people to read."""
    native = native_library()
    facts = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "ia3-kernels": version("ia3-kernels") or "not installed (running from a checkout)",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    if isinstance(native, ModuleType):
        facts["native library"] = "built"
        facts["instruction set"] = f"{native.isa()} (available: {', '.join(native.available_isas())})"
        facts["16-bit matmul"] = ", ".join(
            f"{str(dtype).removeprefix('torch.')}: {native.matmul_route(dtype)}"
            for dtype in (torch.bfloat16, torch.float16)
        )
    else:
        facts["native library"] = f"not built ({native})"
        facts["instruction set"] = "chosen by torch"
    return facts
