"""The route of a matmul with a scale on a GPU: the library and a pass, a Triton kernel, or a CUDA kernel.

Who knows, in this order: ``IA3_GPU_MATMUL``; what ``ia3 tune`` measured on this very device, for the same weight and a
similar number of rows; the figures that come with the package (``routes_sm90.json``: one H100), of the shape that is
nearest. Where nobody does it is the library. Nothing is ever measured inside of a user's step.

``ia3 tune`` keeps one small JSON file for each device, versions of torch and Triton, and sources of the kernels.
"""

from __future__ import annotations

import functools
import glob
import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import target
from .launches import FEW_ROWS, LinearLaunch

# Seconds of the host for a kernel that Python launches with Triton, and so the least that a call by it takes outside of
# a CUDA graph. 70 to 100 us on the H100's host, where the library and a pass take 36 (bench/results).
TRITON_LAUNCH = 100e-6
# Measurements of a weight answer for four times as few or as many rows.
_OCTAVES = 2


@dataclass(frozen=True, order=True)
class Product:
    """A matmul with a scale, ``[rows, inputs] x [inputs, outputs]``, as far as its time depends on it.

    side: ``input`` or ``output``, where the scale is; with one on either side ``output``. element_size: bytes.
    is_transposed: the weight lies in memory as ``[inputs, outputs]``, a Conv1D's.
    """

    side: str
    rows: int
    outputs: int
    inputs: int
    element_size: int
    is_transposed: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Return what two products share if one's measurements hold for the other: kernels differ with few rows."""
        return self.side, self.element_size, self.is_transposed, self.rows <= FEW_ROWS

    def octaves(self, other: Product) -> float:
        """Return how far another product is: the distance of (rows, outputs, inputs), in powers of two."""
        sizes = zip((self.rows, self.outputs, self.inputs), (other.rows, other.outputs, other.inputs), strict=True)
        return math.hypot(*(math.log2(max(mine, 1) / max(its, 1)) for mine, its in sizes))


def counted(rows: int) -> int:
    """Return the rows that a choice is made for: up to FEW_ROWS these, more rounded up to three leading bits.

    Lengths that change from step to step so share a choice, whichever of them comes first.
    """
    unit = 1 if rows <= FEW_ROWS else 1 << (rows.bit_length() - 3)
    return -(-rows // unit) * unit


@dataclass(frozen=True)
class Measurement:
    """Medians in seconds, of what runs on the GPU; None for a kernel that does not take the product, or is not there.

    library: the library's product, and a pass over its output (output side) or over the input before it. triton,
    launch: the fastest launch of the Triton kernel. cuda, tile: the fastest tile of the CUDA matmul.
    """

    library: float
    triton: float | None = None
    launch: LinearLaunch | None = None
    cuda: float | None = None
    tile: str | None = None

    def fastest(self, available: Collection[str], is_captured: bool) -> str:
        """Return the name of the fastest route of those that are available; the library's where another is as fast.

        is_captured: the host's time does not count, as in a CUDA graph.
        """
        times = {"library": self.library, "cuda": self.cuda, "triton": self.triton}
        if self.triton is not None and not is_captured:
            times["triton"] = max(self.triton, TRITON_LAUNCH)
        known = {name: time for name, time in times.items() if time is not None and name in {"library", *available}}
        return min(known, key=lambda name: known[name])

    def __str__(self) -> str:
        times = {"library": self.library, "Triton": self.triton, "CUDA": self.cuda}
        return ", ".join(f"{name} {time * 1e6:.1f} us" for name, time in times.items() if time is not None)


Measurements = Mapping[Product, Measurement]


class Route(NamedTuple):
    """``library``, ``triton`` or ``cuda``, the reason in words, and what was measured to be its fastest launch."""

    name: str
    reason: str
    launch: LinearLaunch | None = None
    tile: str | None = None


# --- files -----------------------------------------------------------------------------------------------------------


def identity(index: int) -> dict[str, str]:
    """Return what measurements of the GPU with this index hold for."""
    return {
        "device": torch.cuda.get_device_name(index),
        "torch": str(torch.__version__),
        "Triton": target.version("triton") or "none",
        "kernels": target.kernel_sources(),
    }


def path_of(index: int) -> Path:
    """Return the file of ``ia3 tune`` for the GPU with this index."""
    device, torch_version, triton_version, kernels = identity(index).values()
    name = re.sub(r"\W+", "-", device).strip("-").lower()
    versions = re.sub(r"[^0-9a-z.]+", "-", f"torch{torch_version}-triton{triton_version}")
    return target.cache_folder() / f"{name}-{versions}-{kernels}.json"


def read(path: Path, wanted: Mapping[str, str] | None = None) -> Measurements:
    """Return the measurements of a file.

    Raises ValueError with the reason where it cannot be understood, or is not of the ``wanted`` device and versions.
    """
    try:
        if not path.is_file():  # a FIFO would be waited for
            raise OSError("it is no file")
        content = json.loads(path.read_text("utf-8"))
        facts, entries = content["of"], content["measurements"]
        measurements = dict(_entry(entry) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error}); run ia3 tune again") from error
    for name, fact in (wanted or {}).items():
        if facts.get(name) != fact:
            raise ValueError(f"it was measured with {name} {facts.get(name)}, and here is {fact}")
    return measurements


def _entry(content: Mapping[str, Any]) -> tuple[Product, Measurement]:
    """Read a product and its measurement; raises ValueError for what nobody could have measured."""
    launch = content["launch"]
    sizes = [content[name] for name in ("rows", "outputs", "inputs", "element_size")]
    times = [content[name] for name in ("library", "triton", "cuda")]
    if content["side"] not in ("input", "output") or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"there is no product {content}")
    if times[0] is None or not all(time is None or (type(time) is float and 0 < time < math.inf) for time in times):
        raise ValueError(f"its times are {times}")
    rows, outputs, inputs, element_size = sizes
    product = Product(content["side"], rows, outputs, inputs, element_size, bool(content["is_transposed"]))
    tile = None if content["tile"] is None else str(content["tile"])
    return product, Measurement(times[0], times[1], None if launch is None else _launch(launch), times[2], tile)


def _launch(content: Mapping[str, object]) -> LinearLaunch:
    """Read the launch that a file describes; raises ValueError for one that no kernel could be launched with."""
    values = {field.name: content[field.name] for field in fields(LinearLaunch)}
    for name, value in values.items():
        if not (isinstance(value, bool) if name == "TMA" else type(value) is int and value > 0):
            raise ValueError(f"{name} is {value!r}")
    return LinearLaunch(**values)  # type: ignore[arg-type]


def write(path: Path, facts: Mapping[str, str], measurements: Measurements) -> None:
    """Replace the file by one that holds these, a line each; a reader sees the old one or the new one."""
    entries = [json.dumps(asdict(product) | asdict(measurements[product])) for product in sorted(measurements)]
    content = f'{{"of": {json.dumps(dict(facts))},\n"measurements": [\n' + ",\n".join(entries) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(content)
    os.replace(scratch, path)
    tuned.cache_clear()


@functools.cache
def tuned(index: int) -> Measurements:
    """Return what ``ia3 tune`` measured on the GPU with this index, read once; nothing where its file is of no use."""
    try:
        return read(path_of(index), identity(index))
    except ValueError:
        return {}


@functools.cache
def shipped(capability: int) -> Measurements:
    """Return the package's figures for GPUs of this compute capability (90 for 9.0); nothing where it has none."""
    path = Path(__file__).with_name(f"routes_sm{capability}.json")
    return read(path) if path.is_file() else {}


def report(index: int | None) -> dict[Path, str]:
    """Say of each file of ``ia3 tune`` in the cache folder whether the GPU's matmuls go by it, or why not."""
    said = {}
    for path in map(Path, sorted(glob.glob(os.path.join(glob.escape(str(target.cache_folder())), "*.json")))):
        try:
            if index is None:
                raise ValueError("there is no GPU that torch can use")
            said[path] = f"used: {len(read(path, identity(index)))} products"
        except ValueError as error:
            said[path] = f"ignored, because {error}"
    return said


# --- the choice ------------------------------------------------------------------------------------------------------


def nearest(product: Product, measurements: Measurements) -> Product | None:
    """Return the product among those measured that is the nearest of its kind; None where there is none of it."""
    alike = [other for other in measurements if other.kind == product.kind]
    return min(alike, key=product.octaves, default=None)


def available() -> frozenset[str]:
    """Return the routes that there are here beside the library."""
    has = {
        "triton": target.triton_problem() is None,
        "cuda": target.cuda_problem() is None and bool(target.hopper_tiles()),
    }
    return frozenset(name for name, is_there in has.items() if is_there)


def _known(index: int | None, product: Product) -> tuple[Measurement | None, str]:
    """Return the measurement that answers for a product, and where it comes from in words."""
    if index is None:
        return None, "not measured for tensors of a CPU"
    same = {
        other: measurement
        for other, measurement in tuned(index).items()
        if (other.outputs, other.inputs) == (product.outputs, product.inputs) and product.octaves(other) <= _OCTAVES
    }
    found = nearest(product, same)
    if found is not None:
        return same[found], f"measured by ia3 tune, rows {found.rows}"
    architecture = target.architecture(index)
    figures = shipped(architecture.capability) if architecture.backend == "cuda" else {}
    found = nearest(product, figures)
    if found is not None:
        shape = f"rows {found.rows}, {found.outputs} x {found.inputs}"
        return figures[found], f"nearest of the package's figures, {shape}"
    return None, "not measured for this product and device (ia3 tune does)"


def linear_route(
    index: int | None, product: Product, available: Collection[str], is_captured: bool, has_adapters: bool = False
) -> Route:
    """Return the route of a product on the GPU with this index.

    available: the routes beside the library that could be taken. is_captured: as for :meth:`Measurement.fastest`.
    has_adapters: rows have scales of their own. Those, and scaled inputs, are the Triton kernel's with few rows only:
    with many its way of scaling the input took twice the library's time wherever it was measured.

    Raises ValueError or RuntimeError for a route that ``IA3_GPU_MATMUL`` asks for and that is none, or cannot run.
    """
    wanted = target.gpu_matmul()
    found, source = _known(index, product)
    launch, tile = (None, None) if found is None or has_adapters else (found.launch, found.tile)
    is_plain = product.side == "output" and not has_adapters
    takes = {name for name in available if name != "triton" or is_plain or product.rows <= FEW_ROWS}
    if wanted != "auto":
        name = wanted if wanted in {"library", *takes} else "library"
        reason = f"asked for by {target.GPU_MATMUL_VARIABLE}={wanted}"
        return Route(name, reason if name == wanted else f"{reason}, which does not take this product", launch, tile)
    if found is None:
        return Route("library", source)
    return Route(found.fastest(takes, is_captured), f"{source}: {found}", launch, tile)
