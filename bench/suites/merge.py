"""Merging vectors into weights and taking them out again: ours and PEFT's own layers, against copying the weights.

One weight at a time, on a GPU also by what the kernels alone take; then all layers of a model.

Checkpoints merged on disk are a suite of their own, `merge_checkpoint`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

import ia3
import ia3_kernels
from ia3_kernels import Residual, merge_, stays_finite, swap_, unmerge_
from ia3_kernels.backends import triton

from .. import llama, measure
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
                recorder.save()
        if not settings.on_gpu:  # it asks for bits, and of weights on the CPU
            _cycles(settings, recorder, dtype)
        _model(settings, recorder, dtype)


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
    fns |= _by_triton(settings, dtype, fresh(), scales, dim)
    times = measure.interleave(fns, settings.rounds(20), warmup=3, device=settings.device)
    _add(recorder, case, dtype, times, source.nbytes)
    if settings.on_gpu:  # an eager call takes the host about as long as its kernels take
        rounds = [{impl: measure.kernels_of(fn)[0] for impl, fn in fns.items()} for _ in range(5)]
        _add(recorder, f"{case}, kernels", dtype, {impl: [r[impl] for r in rounds] for impl in fns}, source.nbytes)


def _by_triton(
    settings: Settings, dtype: str, weight: Tensor, scales: tuple[Tensor, ...], dim: int
) -> dict[str, Callable[[], object]]:
    """Exact merging by Triton's kernels, where others run by default."""
    chosen, kind = ia3_kernels.explain("merge_exact_", settings.device, DTYPES[dtype]).backend, settings.device.type
    if chosen == "triton" or triton.BACKEND.unavailable() or triton.BACKEND.gap("merge_exact_", kind, DTYPES[dtype]):
        return {}
    operators: Any = triton.BACKEND.operators
    first, second = (scale if dim == 0 else scale[None] for scale in scales)
    residual = operators["merge_exact_"](weight, first, dim)
    return {
        "ours, triton: exact": lambda: operators["merge_exact_"](weight, first, dim),
        "ours, triton: exact unmerge": lambda: operators["unmerge_exact_"](weight, first, dim, *residual),
        "ours, triton: swap": lambda: operators["swap_exact_"](weight, first, second, dim, *residual),
        "ours, triton: check": lambda: operators["stays_finite"](weight, first, dim),
    }


def _add(recorder: Recorder, case: str, dtype: str, times: Mapping[str, Sequence[float]], weight: int) -> None:
    """Records times, and their bytes a second against those of the copy, for a weight of so many bytes."""
    for impl, values in times.items():
        # Credited with reading and writing the weight, which the equation needs; the check only reads it.
        nbytes = weight * (1 if "check" in impl else 2)
        ratios = {}
        if impl != "copy":
            copied = [2 * weight / t for t in times["copy"]]
            ratios["copy bandwidth"] = measure.paired_ratio([nbytes / t for t in values], copied)
        if impl in _BASELINES:
            ratios[_BASELINES[impl]] = measure.paired_ratio(values, times[_BASELINES[impl]])
        recorder.add(_SUITE, case, dtype, impl, times=values, ratios=ratios, nbytes=nbytes)


# --- a model's weights ---------------------------------------------------------------------------------------------

_MODEL_SECONDS = 10.0  # after which no other round begins


def _block(settings: Settings) -> nn.Module:
    """What PEFT's defaults scale in a layer of Llama-3.2-3B; on a CPU, of the small Llama."""
    sizes = llama.config(settings)
    heads = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
    narrow = heads * sizes.num_key_value_heads
    return nn.ModuleDict(
        {
            "k_proj": nn.Linear(sizes.hidden_size, narrow, bias=False),
            "v_proj": nn.Linear(sizes.hidden_size, narrow, bias=False),
            "down_proj": nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False),
        }
    )


def _with_vectors(library: Any, blocks: nn.Module, settings: Settings) -> Any:
    """A model of this library with two adapters of signs: merging neither grows weights nor lets them vanish."""
    config = library.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = library.get_peft_model(blocks, config, "first")
    model.add_adapter("second", config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            signs = torch.randint(2, parameter.shape, generator=generator, device="cpu")
            parameter.data.copy_(signs * 2.0 - 1.0)
    return model.to(settings.device)


def _model(settings: Settings, recorder: Recorder, dtype: str) -> None:
    """All of a model's layers merged, swapped and unmerged, exactly and as PEFT does, against copying their weights."""
    count = 28 if settings.on_gpu and not settings.quick else 2 if settings.quick else 4
    with torch.device(settings.device):
        models = {
            name: _with_vectors(
                library, nn.ModuleList(_block(settings).to(DTYPES[dtype]) for _ in range(count)), settings
            )
            for name, library in (("ours", ia3), ("peft", peft))
        }
    weights = [tensor for name, tensor in models["ours"].named_parameters() if name.endswith("base_layer.weight")]
    copies = [measure.copy_function(weight.nbytes, settings.device) for weight in weights]

    def swap_as_peft_does(model: Any) -> None:
        model.unmerge_adapter()
        model.set_adapter("second")
        model.merge_adapter()

    ours, theirs = models["ours"], models["peft"]
    steps: dict[str, Callable[[], object]] = {
        "copy": lambda: [copy() for copy in copies],
        "ours, exact": lambda: ours.merge_adapter(["first"]),
        "ours, swap": lambda: ours.swap_adapter("first", "second"),
        "ours, exact unmerge": ours.unmerge_adapter,
        "peft merge": theirs.merge_adapter,
        "peft swap": partial(swap_as_peft_does, theirs),
        "peft unmerge": theirs.unmerge_adapter,
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that its result is inexact
        for round_number in range(1 + settings.rounds(9)):
            if round_number > 1 and time.perf_counter() - started > _MODEL_SECONDS:
                break
            theirs.set_adapter("first")
            for name, step in steps.items():
                seconds = measure.interleave({name: step}, 1, warmup=0, device=settings.device)[name]
                times[name] += seconds if round_number else []
        case = f"a model of {len(weights)} layers, {sum(weight.nbytes for weight in weights) / 1e6:.0f} MB"
        baselines = {"ours, exact": "peft merge", "ours, swap": "peft swap", "ours, exact unmerge": "peft unmerge"}
        recorder.add_times(
            *(_SUITE, case, dtype, times),
            {name: ("copy", *filter(None, [baselines.get(name)])) for name in times if name != "copy"},
            dict.fromkeys(times, 2 * sum(weight.nbytes for weight in weights)),
        )
        if settings.on_gpu:
            theirs.set_adapter("first")
            profiled = {name: measure.kernels_of(step) for name, step in steps.items()}
            for name, (seconds, launches) in profiled.items():
                ratios = {"copy": seconds / profiled["copy"][0], "launches": float(launches)}
                recorder.add(_SUITE, f"{case}, kernels", dtype, name, times=[seconds], ratios=ratios)
    recorder.save()


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
