"""The one module that answers questions about hardware, environment variables and versions."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from .launches import Architecture
from .schemas import COMPILED, EXACT

# IA3_BACKEND and IA3_GPU_MATMUL are read when something is first chosen by them, and again after backends.refresh().
BACKEND_VARIABLE = "IA3_BACKEND"  # auto (default), native, triton, cuda, reference
GPU_MATMUL_VARIABLE = "IA3_GPU_MATMUL"  # auto (default), library, triton, cuda
ISA_VARIABLE = "IA3_CPU_ISA"  # auto (default), avx512, avx2, plain: read by the native library when it loads
MATMUL_VARIABLE = "IA3_CPU_MATMUL"  # auto (default), widen, library: read by the native library at first use
CACHE_VARIABLE = "IA3_CACHE"  # the folder of what `ia3 tune` measured
# The first release with tensor descriptors that the host makes.
OLDEST_TRITON = (3, 4)


@functools.cache
def requested_backend() -> str:
    """Return the backend that the user asks for by name, or ``auto``."""
    return os.environ.get(BACKEND_VARIABLE, "auto").strip().lower() or "auto"


@functools.cache
def gpu_matmul() -> str:
    """Return the matmul that the user wants on a GPU: ``auto``, ``library``, ``triton`` or ``cuda``.

    Raises ValueError for another word, and RuntimeError for kernels that cannot run here.
    """
    wanted = os.environ.get(GPU_MATMUL_VARIABLE, "auto").strip().lower() or "auto"
    if wanted not in ("auto", "library", "triton", "cuda"):
        raise ValueError(f"{GPU_MATMUL_VARIABLE} is {wanted!r:.200}; expected auto, library, triton or cuda.")
    problem = {"triton": triton_problem, "cuda": cuda_problem}.get(wanted, lambda: None)()
    if problem is not None:
        raise RuntimeError(f"{GPU_MATMUL_VARIABLE} is {wanted!r:.200}, but {problem}")
    return wanted


def forget_variables() -> None:
    """Read IA3_BACKEND and IA3_GPU_MATMUL anew from here on; ``backends.refresh()`` calls this."""
    requested_backend.cache_clear()
    gpu_matmul.cache_clear()


def cache_folder() -> Path:
    """Return the folder where measurements of this user's devices are kept."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "ia3-kernels")


def host_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "yes", "on")


@functools.cache
def triton_problem() -> str | None:
    """Return why Triton's kernels cannot run in this process, or None."""
    if not is_interpreted() and not torch.cuda.is_available():
        return "there is no GPU that torch can use (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)."
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install the Triton that belongs to this torch."
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton is {triton.__version__}, and the kernels need {oldest} or newer; update torch or Triton."
    return None


@functools.cache
def architecture(index: int | None) -> Architecture:
    """Return what kernel launches depend on, of the GPU with this index; of an imaginary one for CPU tensors."""
    if index is None:
        return Architecture("cuda", 80, 4)
    properties = torch.cuda.get_device_properties(index)
    backend = "cuda" if torch.version.hip is None else "hip"
    return Architecture(backend, 10 * properties.major + properties.minor, properties.multi_processor_count)


def device_index(device: torch.device) -> int:
    """Return the number of a GPU: the current one where the device does not say."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def cuda_problem() -> str | None:
    """Return why the compiled CUDA kernels cannot run in this process, or None."""
    kernels = _cuda_kernels()
    if not isinstance(kernels, ModuleType):
        return kernels
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use."
    oldest = min(kernels.architectures())
    found = architecture(torch.cuda.current_device()).capability
    if found < oldest:
        return f"this GPU is of compute capability {found / 10}, and the kernels need {oldest / 10} or newer."
    return None


@functools.cache
def kernel_sources() -> str:
    """Return a hash of the GPU kernels' sources and launches, by which measurements know what they measured."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*(package / "triton").glob("*.py"), package / "launches.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    kernels = _cuda_kernels()
    if isinstance(kernels, ModuleType):
        digest.update(kernels.sources().encode())
    return digest.hexdigest()[:16]


@functools.cache
def native_library() -> ModuleType | ImportError:
    """Return the compiled extension, or the error that says why there is none that fits these files."""
    try:
        library = importlib.import_module("ia3_kernels._C")
    except ImportError as error:
        return error
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [op for op in COMPILED if not has_kernel(f"ia3::{op}", "CompositeExplicitAutograd")]
    missing += [
        name for name in (*EXACT, "fast", "isa", "matmul_route", "forget_choices") if not hasattr(library, name)
    ]
    if missing:
        raise ImportError(
            f"ia3_kernels: {library.__file__} was built from other sources than the Python files beside it, and lacks "
            f"{', '.join(missing)}; build the package again, or delete that file to run the slower reference."
        )
    return library


@functools.cache
def _cuda_kernels() -> ModuleType | str:
    """Return the bindings of the CUDA kernels, or why there are none: not built, or no longer fitting the rest."""
    library = native_library()
    if not isinstance(library, ModuleType):
        return f"the native library is not built ({library}); reinstall with a C++ compiler and nvcc to build it."
    kernels: ModuleType = library.cuda
    for built in Path(library.__file__ or "").parent.glob("libia3_cuda.*"):
        try:
            kernels.load(str(built))
        except RuntimeError as error:
            return str(error)
    if not kernels.is_loaded():
        return "the native library was built without CUDA; reinstall with a torch that has CUDA, and with nvcc."
    return kernels


def hopper_tiles() -> list[str]:
    """Return the names of the tiles that the Hopper matmul was built with; none without CUDA kernels."""
    kernels = _cuda_kernels()
    return list(kernels.hopper_tiles()) if isinstance(kernels, ModuleType) else []


def hopper_tile(name: str | None) -> int:
    """Return the number of a tile of the Hopper matmul; of the smallest where there is none of that name."""
    tiles = hopper_tiles()
    return tiles.index(name) if name in tiles else len(tiles) - 1


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, str]:
    """Return what this machine and installation offer, as label -> sentence fragments for people to read.

    Where an environment variable has a word that means nothing, its fact is the sentence that says so.
    """
    native = native_library()
    facts: dict[str, Callable[[], str]] = {
        "python": platform.python_version,
        "torch": lambda: str(torch.__version__),
        "ia3-kernels": lambda: version("ia3-kernels") or "not installed (running from a checkout)",
        "machine": lambda: f"{platform.machine()}, {torch.get_num_threads()} threads",
        "accelerator": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    if isinstance(native, ModuleType):
        facts["native library"] = lambda: "built"
        facts["instruction set"] = lambda: f"{native.isa()} (available: {', '.join(native.available_isas())})"
        facts["16-bit matmul"] = lambda: ", ".join(
            f"{str(dtype).removeprefix('torch.')}: {native.matmul_route(dtype)}"
            for dtype in (torch.bfloat16, torch.float16)
        )
    else:
        facts["native library"] = lambda: f"not built ({native})"
        facts["instruction set"] = lambda: "chosen by torch"
    facts["cuda kernels"] = _describe_cuda
    facts["triton kernels"] = lambda: triton_problem() or f"Triton {version('triton')}, matmul: {gpu_matmul()}"
    described = {}
    for label, fact in facts.items():
        try:
            described[label] = fact()
        except (RuntimeError, ValueError) as error:
            described[label] = str(error)
    return described


def _describe_cuda() -> str:
    """Return which architectures are inside of the CUDA library, and whether one of them is here."""
    kernels = _cuda_kernels()
    if not isinstance(kernels, ModuleType):
        return kernels
    inside = ", ".join(f"sm_{number}{'a' if number == 90 else ''}" for number in kernels.architectures())
    problem = cuda_problem()
    return f"{inside}; Hopper tiles: {', '.join(hopper_tiles())}" + (f"; not usable: {problem}" if problem else "")
