"""What ``ia3 tune`` measured on this user's device: which route a matmul takes, and with which launch.

One small JSON file a device, versions of torch and Triton, and hash of the kernels' sources: what changes any of them
starts afresh. Nothing is ever measured inside of a user's step; where nothing was measured, the library is used.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from . import target
from .launches import LinearLaunch


@dataclass(frozen=True)
class Measurement:
    """Medians in seconds of a ``scaled_linear`` with an output scale.

    library: the library's product, and a pass over the output. triton, launch: the fastest launch of our Triton kernel.
    cuda, tile: the fastest tile of our CUDA kernels; None where they do not take the shape, or are not built.
    """

    library: float
    triton: float
    launch: LinearLaunch
    cuda: float | None = None
    tile: str = "auto"

    @property
    def route(self) -> str:
        """The fastest; the library where it is as fast as ours."""
        times = {"library": self.library, "triton": self.triton}
        if self.cuda is not None:
            times["cuda"] = self.cuda
        return min(times, key=lambda name: times[name])


class Route(NamedTuple):
    """``library``, ``triton`` or ``cuda``, the reason in words, and what was measured to be its fastest launch."""

    name: str
    reason: str
    launch: LinearLaunch | None = None
    tile: str = "auto"


def linear_key(rows: int, outputs: int, inputs: int, dtype: torch.dtype, is_transposed: bool) -> str:
    """What measurements are filed under. Rows count in powers of two; outputs and inputs are a model's, and exact."""
    bucket = 1 << max(rows - 1, 0).bit_length()
    layout = "in x out" if is_transposed else "out x in"
    return f"scaled_linear {str(dtype).removeprefix('torch.')} rows {bucket} {layout} {outputs} x {inputs}"


def path_of(index: int) -> Path:
    """The file of the GPU with this index."""
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(index)).strip("-").lower()
    versions = f"torch{torch.__version__}-triton{target.version('triton')}"
    return target.cache_folder() / f"{name}-{re.sub(r'[^0-9a-z.]+', '-', versions)}-{target.kernel_sources()}.json"


def read(path: Path) -> dict[str, Measurement]:
    """The measurements of a file; none where there is no file, or one that cannot be understood."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return {
            key: Measurement(
                float(entry["library"]),
                float(entry["triton"]),
                _launch(entry["launch"]),
                None if entry["cuda"] is None else float(entry["cuda"]),
                str(entry["tile"]),
            )
            for key, entry in content["measurements"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _launch(content: Mapping[str, object]) -> LinearLaunch:
    """The launch that a file describes; raises ValueError for one that no kernel could be launched with."""
    values = {field.name: content[field.name] for field in fields(LinearLaunch)}
    for name, value in values.items():
        if not (isinstance(value, bool) if name == "TMA" else type(value) is int and value > 0):
            raise ValueError(f"{name} is {value!r}")
    return LinearLaunch(**values)  # type: ignore[arg-type]


def write(path: Path, measurements: Mapping[str, Measurement]) -> None:
    """Replace the file by one that holds these; a reader sees the old one or the new one."""
    content = {"measurements": {key: asdict(measurements[key]) for key in sorted(measurements)}}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(scratch, path)
    of_device.cache_clear()


@functools.cache
def of_device(index: int) -> Mapping[str, Measurement]:
    """The measurements of the GPU with this index, read once."""
    return read(path_of(index))


def linear_route(
    index: int | None, rows: int, outputs: int, inputs: int, dtype: torch.dtype, is_transposed: bool
) -> Route:
    """The route of this product."""
    wanted = target.gpu_matmul()
    key = linear_key(rows, outputs, inputs, dtype, is_transposed)
    found = of_device(index).get(key) if index is not None else None
    known = {} if found is None else {"launch": found.launch, "tile": found.tile}
    if wanted != "auto":
        return Route(wanted, f"asked for by {target.GPU_MATMUL_VARIABLE}={wanted}", **known)  # type: ignore[arg-type]
    if found is None:
        return Route("library", "not measured for this shape and device (ia3 tune does)")
    times = f"library {found.library * 1e6:.1f} us, Triton {found.triton * 1e6:.1f} us"
    if found.cuda is not None:
        times += f", CUDA {found.cuda * 1e6:.1f} us"
    return Route(found.route, f"measured: {times}", found.launch, found.tile)
