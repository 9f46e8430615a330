"""Merging a vector into one weight and taking it out again: ours and PEFT's own layers, against copying the weight.

Checkpoints merged on disk are a suite of their own, `merge_checkpoint`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

from ia3_kernels import Residual, merge_, stays_finite, swap_, unmerge_

from .. import measure
from ..records import Recorder
from ..settings import DTYPES, Settings

_SUITE = "merge"
_SIDES = ("rows", "columns")  # dim 0, the output side; dim 1, the input side
# What each of ours is compared with
_BASELINES: Mapping[str, str] = {
    "ours": "peft merge",
    "ours, exact": "peft merge",
    "ours, exact unmerge": "peft unmerge",
}


def run(settings: Settings, recorder: Recorder) -> None:
    """Every dtype, both sides, a small and a large weight; then what many cycles leave, and what undoing keeps."""
    torch.manual_seed(0)
    shapes = [(64, 256)] if settings.quick else [(1024, 4096), (4096, 14336)]
    for dtype in settings.dtypes:
        for rows, columns in shapes:
            for dim, side in enumerate(_SIDES):
                _times(settings, recorder, dtype, (rows, columns), dim, f"{side} of {rows}x{columns}")
        _cycles(settings, recorder, dtype)


# --- times -------------------------------------------------------------------------------------------------------


class _PeftLayer:
    """One of PEFT's layers with our weight and vector, merged or unmerged whenever asked, whatever it is."""

    def __init__(self, weight: Tensor, scale: Tensor, dim: int) -> None:
        base = nn.Linear(1, 1, bias=False, device=weight.device)
        base.in_features, base.out_features = weight.shape[1], weight.shape[0]
        base.weight = nn.Parameter(weight, requires_grad=False)
        config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if dim == 1 else [])
        model = peft.get_peft_model(nn.Sequential(base), config)
        self.layer: Any = model.base_model.model[0]
        self.layer.ia3_l["default"].data = scale.reshape(self.layer.ia3_l["default"].shape).clone()

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.layer.base_layer.weight.data
        return weight

    def merge(self) -> None:
        self.layer.merged_adapters.clear()
        self.layer.merge()

    def unmerge(self) -> None:
        self.layer.merged_adapters[:] = ["default"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the result is inexact, every time
            self.layer.unmerge()


class _OurWeight:
    """A weight with what the last exact merge of it kept."""

    def __init__(self, weight: Tensor, scales: tuple[Tensor, Tensor], dim: int) -> None:
        self.weight, self.scales, self.dim = weight, scales, dim
        self.residual = self._exact()

    def _exact(self) -> Residual:
        residual = merge_(self.weight, self.scales[0], self.dim, exact=True)
        assert residual is not None
        return residual

    def exact(self) -> None:
        self.residual = self._exact()

    def unmerge(self) -> None:
        unmerge_(self.weight, self.scales[0], self.dim, self.residual)

    def swap(self) -> None:
        self.residual = swap_(self.weight, *self.scales, self.dim, self.residual)


def _times(settings: Settings, recorder: Recorder, dtype: str, shape: tuple[int, int], dim: int, case: str) -> None:
    def fresh() -> Tensor:
        return (0.02 * torch.randn(shape, device=settings.device)).to(DTYPES[dtype])

    # Signs: however often a weight is merged or unmerged in whatever order, it neither grows nor vanishes.
    scales = tuple(torch.randint(2, (shape[dim],), device=settings.device) * 2.0 - 1.0 for _ in range(2))
    ours, theirs, plain = _OurWeight(fresh(), (scales[0], scales[1]), dim), _PeftLayer(fresh(), scales[0], dim), fresh()
    source, target = fresh(), fresh()
    fns: dict[str, Callable[[], object]] = {
        "copy": partial(target.copy_, source),
        "ours": partial(merge_, plain, scales[0], dim),
        "ours, check that it stays finite": partial(stays_finite, plain, scales[0], dim),
        "ours, exact": ours.exact,
        "ours, exact unmerge": ours.unmerge,
        "ours, swap": ours.swap,
        "peft merge": theirs.merge,
        "peft unmerge": theirs.unmerge,
    }
    times = measure.interleave(fns, settings.rounds(20), warmup=3, device=settings.device)
    for impl, values in times.items():
        # Credited with reading and writing the weight, which the equation needs; the check only reads it.
        nbytes = source.nbytes * (1 if "check" in impl else 2)
        ratios = {}
        if impl != "copy":
            copied = [2 * source.nbytes / t for t in times["copy"]]
            ratios["copy bandwidth"] = measure.paired_ratio([nbytes / t for t in values], copied)
        if impl in _BASELINES:
            ratios[_BASELINES[impl]] = measure.paired_ratio(values, times[_BASELINES[impl]])
        recorder.add(_SUITE, case, dtype, impl, times=values, ratios=ratios, nbytes=nbytes)


# --- what is left ------------------------------------------------------------------------------------------------


def _vectors(count: int, size: int) -> Sequence[Tensor]:
    return (1 + 0.2 * torch.randn(count, size)).unbind()


def _cycles(settings: Settings, recorder: Recorder, dtype: str) -> None:
    """Weights that differ from what they were after merging and unmerging with a vector that changes each time."""
    before = (0.02 * torch.randn(64, 128)).to(DTYPES[dtype])
    many = 20 if settings.quick else 10_000
    for cycles in (1, many):
        vectors = _vectors(cycles, 64)
        ours, theirs = before.clone(), _PeftLayer(before.clone(), vectors[0], 0)
        residual = None
        for vector in vectors:
            residual = merge_(ours, vector, exact=True)
            assert residual is not None
            unmerge_(ours, vector, 0, residual)
            theirs.layer.ia3_l["default"].data = vector[:, None]
            theirs.merge()
            theirs.unmerge()
        case = f"wrong weights after {cycles:,} cycle{'s' if cycles > 1 else ''}, {before.numel():,} weights"
        for impl, after in {"ours": ours, "peft": theirs.weight}.items():
            wrong = int((after != before).sum())
            recorder.add(_SUITE, case, dtype, impl, ratios={"all weights": wrong / before.numel()})
    large = (0.02 * torch.randn((64, 256) if settings.quick else (1024, 4096))).to(DTYPES[dtype])
    residual = merge_(large, _vectors(1, len(large))[0], exact=True)
    assert residual is not None
    bits = {"one bit a weight": 8 * residual.nbytes / large.numel()}
    recorder.add(_SUITE, "kept for unmerging", dtype, "ours, exact", ratios=bits, nbytes=residual.nbytes)
