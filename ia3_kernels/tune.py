"""Measures, for ``ia3 tune`` and never on its own: the library's matmul against launches of ours, on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import matmul, target
from .launches import Architecture, LinearLaunch, linear_launch
from .routes import Measurement


def launches(
    rows: int, outputs: int, inputs: int, element_size: int, architecture: Architecture, can_use_tma: bool
) -> list[LinearLaunch]:
    """The computed launch first, then those around it that are worth a try."""
    first = linear_launch(rows, outputs, inputs, element_size, architecture, can_use_tma)
    tiles = [(first.BLOCK_M, first.BLOCK_N, first.BLOCK_K)]
    warps: tuple[int, ...] = (4,)
    stages = (3, 4)
    if rows <= 16:
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
    """Seconds of one call, with cold caches."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=10, rep=40, return_mode="median")) * 1e-3


def measure_linear(
    index: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype, is_transposed: bool
) -> Measurement:
    """Times ``scaled_linear`` with an output scale on the GPU ``index``; launches that it refuses are left out.

    Raises RuntimeError if a launch computes something else than the library: then nothing of it can be trusted.
    """
    from triton.runtime.errors import OutOfResources

    from .triton import activation, linear

    device = torch.device("cuda", index)
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    stored = torch.randn(*((inputs, outputs) if is_transposed else (outputs, inputs)), device=device) / inputs**0.5
    weight = stored.to(dtype).t() if is_transposed else stored.to(dtype)
    scale = torch.rand(outputs, device=device) + 0.5
    architecture = target.architecture(index)

    def run_library() -> Tensor:
        return matmul.library(activation.forward, x, weight, None, None, scale)

    expected = run_library()
    library = _median(run_library)
    best: tuple[float, LinearLaunch] | None = None
    can_use_tma = x.stride(0) * x.element_size() % 16 == 0 and stored.stride(0) * x.element_size() % 16 == 0
    for launch in launches(rows, outputs, inputs, x.element_size(), architecture, can_use_tma):

        def run(launch: LinearLaunch = launch) -> Tensor:
            return linear.matmul(x, weight, None, None, scale, architecture=architecture, launch=launch)

        try:
            result = run()
        except OutOfResources:  # more shared memory or registers than this device has
            continue
        _check(result, expected, f"Triton with {launch}", inputs)
        seconds = _median(run)
        if best is None or seconds < best[0]:
            best = seconds, launch
    if best is None:
        raise RuntimeError(f"no launch of scaled_linear runs on this device for {rows} rows, {outputs} x {inputs}.")
    fastest: tuple[float, str] | None = None
    for number, tile in enumerate(target.hopper_tiles() if rows > 16 and target.cuda_problem() is None else []):

        def run_cuda(number: int = number) -> Tensor | None:
            return hopper_linear(x, weight, scale, number)

        taken = run_cuda()
        if taken is None:
            continue
        _check(taken, expected, f"CUDA with tile {tile}", inputs)
        seconds = _median(run_cuda)
        if fastest is None or seconds < fastest[0]:
            fastest = seconds, tile
    return Measurement(library, *best, *(fastest or ()))


def hopper_linear(x: Tensor, weight: Tensor, output_scale: Tensor | None, tile: int = -1) -> Tensor | None:
    """Compute ``(x Wᵀ) ∘ s`` with one of the CUDA matmul's tiles, -1 for its own choice; None where it declines."""
    native: Any = target.native_library()
    result: Tensor | None = native.cuda.hopper_linear(x, weight, None, output_scale, tile)
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
