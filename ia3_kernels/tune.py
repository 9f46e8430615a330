"""Measures, for ``ia3 tune`` and never on its own: the library's matmul against the kernels there are, on a GPU."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import matmul, routes, target
from .launches import FEW_ROWS, Architecture, LinearLaunch, linear_launch
from .routes import Measurement, Product

Scales = tuple[Tensor | None, Tensor | None]  # of the input, of the output


def launches(
    rows: int, outputs: int, inputs: int, element_size: int, architecture: Architecture, can_use_tma: bool
) -> list[LinearLaunch]:
    """Return the computed launch first, then those around it that are worth a try."""
    first = linear_launch(rows, outputs, inputs, element_size, architecture, can_use_tma)
    tiles = [(first.BLOCK_M, first.BLOCK_N, first.BLOCK_K)]
    warps: tuple[int, ...] = (4,)
    stages = (3, 4)
    if rows <= FEW_ROWS:
        tiles += [(first.BLOCK_M, n, k) for n in (16, 32, 64) for k in (128, 256)]
    elif element_size == 4:
        tiles += [(first.BLOCK_M, 64, 32), (first.BLOCK_M, 128, 16)]
        stages = (2, 3)
    else:
        tiles += [(m, n, k) for m, n in ((64, 128), (128, 128), (128, 256)) for k in (32, 64) if m <= 2 * rows]
        warps = (4, 8)
    splits = sorted({1, first.SPLIT_K, 2 * first.SPLIT_K}) if first.SPLIT_K > 1 else [1]
    around = [
        LinearLaunch(m, n, k, split, first.GROUP_M, first.TMA, warp, stage)
        for (m, n, k), split, warp, stage in itertools.product(tiles, splits, warps, stages)
    ]
    return list(dict.fromkeys([first, *around]))


def _median(function: Callable[[], object]) -> float:
    """Measure the seconds of a call on the GPU, caches cold: the median of 50, with what the host takes hidden."""
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # more than any level of cache holds
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(60)]
    for start, end in events:
        cache.zero_()  # takes longer than the host does for the call
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in events[10:])) * 1e-3


def measure_linear(index: int, product: Product, dtype: torch.dtype) -> Measurement:
    """Time ``scaled_linear`` with one scale on the GPU ``index``; launches that it refuses are left out.

    What training runs where a gradient of the scale is recorded is not measured: the product is kept there, and the
    library with a pass is the only way to have it (``linear`` in csrc/torch/cuda.cpp).

    Raises RuntimeError if a kernel computes something else than the library: then nothing of it can be trusted.
    """
    device = torch.device("cuda", index)
    x = torch.randn(product.rows, product.inputs, device=device, dtype=dtype)
    shape = (product.inputs, product.outputs) if product.is_transposed else (product.outputs, product.inputs)
    stored = (torch.randn(*shape, device=device) / product.inputs**0.5).to(dtype)
    weight = stored.t() if product.is_transposed else stored
    scale = torch.rand(product.inputs if product.side == "input" else product.outputs, device=device) + 0.5
    scales = (scale, None) if product.side == "input" else (None, scale)
    run_library = _library(x, weight, scales)
    expected = run_library()
    fastest: dict[str, tuple[float, Any]] = {}
    for route, label, run in _candidates(product, x, weight, scales):
        result = run()
        if result is None:  # more shared memory or registers than this device has; not for these operands
            continue
        _check(result, expected, f"{route} with {label}", product.inputs)
        seconds = _median(run)
        if route not in fastest or seconds < fastest[route][0]:
            fastest[route] = seconds, label
    nothing = (None, None)
    return Measurement(_median(run_library), *fastest.get("triton", nothing), *fastest.get("cuda", nothing))


def _library(x: Tensor, weight: Tensor, scales: Scales) -> Callable[[], Tensor]:
    """Return the library's route as the backend that would run takes it, with its own pass."""
    if target.cuda_problem() is None:
        native: Any = target.native_library()
        return lambda: native.cuda.scaled_linear(x, weight, *scales, -1)
    return lambda: matmul.library(x, weight, None, *scales)


def _candidates(
    product: Product, x: Tensor, weight: Tensor, scales: Scales
) -> Iterator[tuple[str, Any, Callable[[], Tensor | None]]]:
    """List the kernels that may take a product: route, launch or tile, and a call that gives None if it does not."""
    is_few = product.rows <= FEW_ROWS
    if target.triton_problem() is None and (is_few or product.side == "output"):
        from triton.runtime.errors import OutOfResources

        from .triton import linear

        architecture = target.architecture(x.device.index)
        stored = weight.t() if product.is_transposed else weight
        can_use_tma = all(matrix.stride(0) * matrix.element_size() % 16 == 0 for matrix in (x, stored))
        sizes = (product.rows, product.outputs, product.inputs)
        for launch in launches(*sizes, x.element_size(), architecture, can_use_tma):

            def run_triton(launch: LinearLaunch = launch) -> Tensor | None:
                try:
                    return linear.matmul(x, weight, None, *scales, architecture=architecture, launch=launch)
                except OutOfResources:
                    return None

            yield "triton", launch, run_triton
    if target.cuda_problem() is None and not is_few:
        native: Any = target.native_library()
        for number, tile in enumerate(target.hopper_tiles()):
            yield "cuda", tile, functools.partial(native.cuda.scaled_linear, x, weight, *scales, number)


def hopper_linear(x: Tensor, weight: Tensor, output_scale: Tensor | None, tile: str | None = None) -> Tensor | None:
    """Compute ``(x Wᵀ) ∘ s`` by the CUDA matmul; None where it declines.

    tile: one of those of :func:`~ia3_kernels.target.hopper_tiles`; by default the one that is known to be the fastest.
    """
    if tile is None:
        product = matmul.product_of(x, weight, "output")
        tile = routes.linear_route(x.device.index, product, ("cuda",), is_captured=True).tile
    native: Any = target.native_library()
    result: Tensor | None = native.cuda.scaled_linear(x, weight, None, output_scale, target.hopper_tile(tile))
    return result


def _check(result: Tensor, expected: Tensor, kernel: str, inputs: int) -> None:
    """Raise RuntimeError for a product that is not the library's."""
    error = float((result.float() - expected.float()).norm() / expected.float().norm())
    # Both round to dtype, the library before scaling as well; their sums differ by the roundings of fp32.
    if not error < 4 * torch.finfo(result.dtype).eps + 4 * torch.finfo(torch.float32).eps * inputs**0.5:
        raise RuntimeError(
            f"scaled_linear in {kernel} differs from the library by {error:.2g} for {len(result)} rows, "
            f"{inputs} -> {result.shape[-1]}, {result.dtype}; nothing was kept: please report it."
        )
