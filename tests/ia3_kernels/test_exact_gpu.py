"""Exact merging by the kernels of GPUs: CUDA's in the emulator, Triton's in its interpreter, both on a GPU.

Whatever they are given, they do to the bit what the CPU does, so that the proofs of ``test_exact.py`` hold for them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3_kernels as kernels
from ia3_kernels import Residual, backends, exact_gpu, exact_reference, target
from ia3_kernels.launches import WeightLaunch

from . import emulated, emulated_bindings
from .test_exact import LAYOUTS, _every_pattern, _hard, _patterns, _same, _same_residual, _scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = DTYPES[1:]
PLACES = ["triton"] if target.is_interpreted() else []
if not target.is_interpreted():
    PLACES += ["emulated"] if emulated_bindings.AVAILABLE else []
    PLACES += ["cuda-cuda", "cuda-triton"] if torch.cuda.is_available() else []


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the tensors are whose exact merging goes to a GPU's kernels."""
    if request.param == "emulated":
        with emulated_bindings.backend(monkeypatch):
            yield "cpu"
        return
    name = request.param.partition("-")[2] or "triton"
    problem = {"triton": target.triton_problem, "cuda": target.cuda_problem}[name]()
    if problem is not None:
        pytest.skip(problem)
    monkeypatch.setenv(target.BACKEND_VARIABLE, name)
    backends.refresh()
    yield "cpu" if request.param == "triton" else "cuda"
    monkeypatch.undo()
    backends.refresh()


def _merged_on_cpu(weight: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, Residual]:
    """The reference's answer, wherever the weight lies."""
    merged = weight.cpu().clone()
    given = scale.cpu() if dim == 0 else scale.cpu()[None]
    return merged, Residual(*exact_reference.merge_exact_(merged, given, dim))


def _assert_merged(found: Tensor, expected: Tensor) -> None:
    """The same bits, but for those of a NaN."""
    found = found.cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    assert _same(found.masked_fill(expected.isnan(), 0), expected.masked_fill(expected.isnan(), 0))


def _chosen_scales(count: int) -> Tensor:
    """Of every kind that there is, without those that differ by their sign or exponent alone."""
    special = [0.0, -0.0, math.inf, math.nan, 1e-45, 2.0**-126, 2.0**-127, 2.0**126, 2.0**127, 3e38, -1.0, 2.0**-14]
    borders = [f(torch.tensor(x)) for x in (1.0, 0.5) for f in (lambda t: t.nextafter(2 * t), lambda t: t.nextafter(-t))]
    drawn = _scales(2000)[torch.randperm(2000)]
    return torch.cat([torch.tensor(special), torch.stack(borders), drawn])[:count]


def _wide_triton() -> dict[str, Callable[..., Any]]:
    """Triton's kernels with units so large that the interpreter has few programs to walk through."""
    from ia3_kernels.triton import exact

    launch = WeightLaunch(4, 16384, 1)
    return exact_gpu.operators(functools.partial(exact.exact_scale, launch=launch), launch.BLOCK_N)


# --- the proof ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_every_16_bit_pattern(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged, swapped and unmerged as on the CPU, with scales of every kind; each bit comes back."""
    count = 16 if target.is_interpreted() else 4096 if device == "cuda" else 64
    if target.is_interpreted():
        triton = backends.triton.BACKEND
        wide = {**triton.operators, **_wide_triton()}
        monkeypatch.setattr(backends, "_BACKENDS", (dataclasses.replace(triton, operators=wide),))
        backends.refresh()
    every, scales = _every_pattern(dtype), _chosen_scales(count)
    for scale in scales.split(64):
        matrix = every.to(device).repeat(len(scale), 1)
        residual = kernels.merge_(matrix, scale.to(device), exact=True)
        expected, of_cpu = _merged_on_cpu(every.repeat(len(scale), 1), scale, 0)
        assert residual is not None
        assert _same_residual(residual.to("cpu"), of_cpu)
        _assert_merged(matrix, expected)
        other = scale.roll(1)
        residual = kernels.swap_(matrix, scale.to(device), other.to(device), 0, residual)
        expected, of_cpu = _merged_on_cpu(every.repeat(len(scale), 1), other, 0)
        assert _same_residual(residual.to("cpu"), of_cpu)
        _assert_merged(matrix, expected)
        kernels.unmerge_(matrix, other.to(device), 0, residual)
        assert bool((_patterns(matrix.cpu()) == _patterns(every)).all())
