"""The operators one by one: against what transformers and PEFT run, and against what the machine can do."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import ia3_kernels
from ia3_kernels import target, tune
from ia3_kernels.backends import triton

from .. import eager, measure
from ..records import Recorder
from ..settings import DTYPES, Settings

_SUITE = "operators"
_Functions = dict[str, Callable[[], object]]
_TIMED_S = 2e-3  # calls shorter than this are timed several in a row


def run(settings: Settings, recorder: Recorder) -> None:
    """Measures every operator in each dtype; without gradients, but where the case says backward."""
    torch.manual_seed(0)
    large = (8 << 20) if settings.quick else (1 << 30) if settings.on_gpu else (256 << 20)
    bandwidth = measure.copy_bandwidth(large, device=settings.device, rounds=settings.rounds(20))
    recorder.add(_SUITE, f"ceiling: copy of {large >> 20} MiB", "any", "copy", times=bandwidth.times, nbytes=2 * large)
    for dtype in settings.dtypes:
        size = 256 if settings.quick else 8192 if settings.on_gpu else 2048
        matmul = measure.matmul_rate(DTYPES[dtype], size=size, device=settings.device, rounds=settings.rounds(10))
        work = f"{matmul.work / 1e9:.3g} GFLOP"
        recorder.add(_SUITE, f"ceiling: matmul {size}x{size}x{size}, {work}", dtype, "matmul", times=matmul.times)
        for activation in ("silu", "gelu_tanh"):
            _activation(settings, recorder, dtype, "gated_activation", activation)
        for activation in ("gelu", "relu"):
            _activation(settings, recorder, dtype, "scaled_activation", activation)
        with torch.no_grad():
            _linear(settings, recorder, dtype, bandwidth.rate, matmul.rate)
            _weight(settings, recorder, dtype)
            _overhead(settings, recorder, dtype)


# --- activations: bound by memory, so held against copying tensors of the same size ------------------------------


def _by_backend(op: str, settings: Settings, dtype: torch.dtype) -> dict[str, Callable[..., object]]:
    """The Triton kernel beside the compiled one that runs by default, where there are both."""
    chosen = ia3_kernels.explain(op, settings.device, dtype).backend
    backend = triton.BACKEND
    if chosen == backend.name or backend.unavailable() or backend.gap(op, settings.device.type, dtype):
        return {}
    return {backend.name: backend.operators[op]}


def _copies(nbytes: int, settings: Settings) -> _Functions:
    source = torch.ones(nbytes, dtype=torch.uint8, device=settings.device)
    return {"copy": measure.copy_function(nbytes, settings.device), "fresh copy": source.clone}


def _add_shares(
    recorder: Recorder, case: str, dtype: str, times: Mapping[str, Sequence[float]], moved: int, copied: int
) -> None:
    """Records each implementation's time against eager's, and its bytes a second against those of the copies.

    Every implementation is credited with the `moved` bytes that the equation needs, however many it really moves.
    """
    for impl, values in times.items():
        nbytes = copied if impl.startswith("copy") else moved
        ratios = {
            f"{name} bandwidth": measure.paired_ratio([nbytes / t for t in values], [copied / t for t in times[name]])
            for name in ("copy", "fresh copy")
            if name != impl
        }
        if impl.startswith("ours"):
            ratios["eager"] = measure.paired_ratio(values, times["eager"])
        recorder.add(_SUITE, case, dtype, impl, times=values, ratios=ratios, nbytes=nbytes)


def _activation(settings: Settings, recorder: Recorder, dtype: str, op: str, activation: str) -> None:
    size = 256 if settings.quick else 16384 if settings.on_gpu else 4096  # far more than a GPU's L2
    gated = op == "gated_activation"
    inputs = [torch.randn(size, size, device=settings.device).to(DTYPES[dtype]) for _ in range(2 if gated else 1)]
    scale = 1 + 0.2 * torch.randn(size, device=settings.device)
    one = inputs[0].nbytes
    implementations = {"ours": getattr(ia3_kernels, op), "eager": getattr(eager, op)}

    forward: _Functions = {impl: partial(fn, *inputs, scale, activation) for impl, fn in implementations.items()}
    output = torch.empty_like(inputs[0])
    forward["ours, given output"] = partial(implementations["ours"], *inputs, scale, activation, out=output)
    for name, kernel in _by_backend(op, settings, DTYPES[dtype]).items():
        forward[f"ours, {name}"] = partial(kernel, *inputs, scale, activation)
    # Reads its inputs, writes the output.
    case = f"{op} {activation} forward {size}x{size}"
    with torch.no_grad():
        times = measure.interleave(
            forward | _copies(one, settings), settings.rounds(20), warmup=3, device=settings.device
        )
    _add_shares(recorder, case, dtype, times, (len(inputs) + 1) * one, 2 * one)

    output_grad = torch.randn_like(inputs[0])
    leaves = [tensor.clone().requires_grad_(True) for tensor in (*inputs, scale)]
    backward: _Functions = {
        impl: partial(torch.autograd.grad, fn(*leaves, activation), leaves, output_grad, retain_graph=True)
        for impl, fn in implementations.items()
    }
    for name, kernel in _by_backend(f"{op}_backward", settings, DTYPES[dtype]).items():
        backward[f"ours, {name}"] = partial(kernel, output_grad, *inputs, scale, activation, None, [True] * len(leaves))
    # Reads the output's gradient and the inputs, writes the inputs' gradients.
    times = measure.interleave(backward | _copies(one, settings), settings.rounds(20), warmup=3, device=settings.device)
    _add_shares(recorder, case.replace("forward", "backward"), dtype, times, (2 * len(inputs) + 1) * one, 2 * one)


# --- scaled_linear ------------------------------------------------------------------------------------------------


def _calls(fn: Callable[[], object], device: torch.device) -> int:
    """How many calls in a row take about as long as the clock needs to see them well."""
    fn()
    measure.synchronize(device)
    start = time.perf_counter()
    fn()
    measure.synchronize(device)
    return max(1, min(100, int(_TIMED_S / max(time.perf_counter() - start, 1e-6))))


def _cold(fn: Callable[[Tensor], object], weights: Sequence[Tensor], start: int) -> Callable[[], object]:
    """`fn` with another weight at every call: in a model, a layer's weight has left the caches since its last use."""
    pool = itertools.cycle([*weights[start:], *weights[:start]])
    return lambda: fn(next(pool))


# name, in_features, out_features, the side of the vector
_Layers = tuple[tuple[str, int, int, str], ...]
_LAYERS: _Layers = (
    ("k_proj", 1024, 256, "output"),
    ("v_proj", 1024, 1024, "output"),
    ("down_proj", 4096, 1024, "input"),
)
# Llama-3.2-3B and Llama-3.1-8B: k_proj and v_proj, the down projection, and what all-linear adds
_GPU_LAYERS: _Layers = (
    ("3B k_proj", 3072, 1024, "output"),
    ("8B k_proj", 4096, 1024, "output"),
    ("3B q_proj", 3072, 3072, "output"),
    ("8B q_proj", 4096, 4096, "output"),
    ("3B down_proj", 8192, 3072, "output"),
    ("8B down_proj", 14336, 4096, "output"),
    ("3B down_proj", 8192, 3072, "input"),
)


def _linear(settings: Settings, recorder: Recorder, dtype: str, bandwidth: float, matmul_rate: float) -> None:
    many = (1, 4, 16, 512, 4096, 16384) if settings.on_gpu else (1, 4, 16, 64, 1024)
    for layer, wide, narrow, side in _GPU_LAYERS if settings.on_gpu else _LAYERS:
        if settings.quick:
            wide, narrow = wide // 16, narrow // 16
        for rows in (1, 4) if settings.quick else many:
            times, moved = _linear_times(settings, DTYPES[dtype], wide, narrow, rows, side)
            # What bounds this shape: the slower of moving its bytes and doing its multiplications.
            by_memory, by_matmul = moved / bandwidth, 2 * rows * narrow * wide / matmul_rate
            ceiling = "copy bandwidth" if by_memory > by_matmul else "matmul rate"
            case = f"scaled_linear {side} side, {layer} {wide}->{narrow}, {rows} row{'s' if rows > 1 else ''}"
            for impl, values in times.items():
                ratios = {
                    base: measure.paired_ratio(values, times[base]) for base in ("eager", "linear") if base != impl
                }
                ratios[ceiling] = max(by_memory, by_matmul) / statistics.median(values)
                recorder.add(_SUITE, case, dtype, impl, times=values, ratios=ratios, nbytes=moved)


def _triton_matmul(settings: Settings, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """Our Triton kernel whatever was measured before, where it can run."""
    if triton.BACKEND.unavailable() or triton.BACKEND.gap("scaled_linear", settings.device.type, dtype):
        return None
    from ia3_kernels.triton import linear

    return partial(linear.matmul, architecture=target.architecture(target.device_index(settings.device)))


def _linear_times(
    settings: Settings, dtype: torch.dtype, wide: int, narrow: int, rows: int, side: str
) -> tuple[dict[str, list[float]], int]:
    """Times of the implementations, and the bytes that the equation has to move."""
    x = torch.randn(rows, wide, device=settings.device).to(dtype)
    weight = (torch.randn(narrow, wide, device=settings.device) / wide**0.5).to(dtype)
    scales = {f"{side}_scale": 1 + 0.2 * torch.randn(wide if side == "input" else narrow, device=settings.device)}
    pool = (1 << 20) if settings.quick else (512 << 20) if settings.on_gpu else (256 << 20)
    weights = [weight.clone() for _ in range(max(3, pool // weight.nbytes))]
    third = len(weights) // 3  # no implementation finds in cache what another has just read
    fns: _Functions = {
        "ours": _cold(lambda w: ia3_kernels.scaled_linear(x, w, **scales), weights, 0),
        "eager": _cold(lambda w: eager.scaled_linear(x, w, **scales), weights, third),
        "linear": _cold(lambda w: F.linear(x, w), weights, 2 * third),
    }
    if settings.on_gpu:
        output_scale = scales.get("output_scale")
        has_cuda = target.cuda_problem() is None and side == "output"
        if has_cuda and tune.hopper_linear(x, weight, output_scale) is not None:
            fns["cuda"] = _cold(lambda w: tune.hopper_linear(x, w, output_scale), weights, third + third // 2)
        if (matmul := _triton_matmul(settings, dtype)) is not None:
            fns["triton"] = _cold(lambda w: matmul(x, w, **scales), weights, third // 2)
        count = 32 if rows <= 64 else 4
        graphs = {impl: measure.captured(fn, count) for impl, fn in fns.items()}
        times = measure.interleave(graphs, settings.rounds(30), warmup=3, device=settings.device)
        times = {impl: [value / count for value in values] for impl, values in times.items()}
    else:
        calls = _calls(fns["linear"], settings.device)
        times = measure.interleave(fns, settings.rounds(30), warmup=3, calls=calls, device=settings.device)
    return times, weight.nbytes + x.nbytes + rows * narrow * x.itemsize


# --- scale_weight_ ------------------------------------------------------------------------------------------------


def _weight(settings: Settings, recorder: Recorder, dtype: str) -> None:
    rows, columns = (256, 512) if settings.quick else (4096, 14336)
    weight = torch.randn(rows, columns, device=settings.device).to(DTYPES[dtype])
    merged = torch.nn.Parameter(weight.clone(), requires_grad=False)

    def merge(scale: Tensor, dim: int) -> None:
        merged.data = eager.scaled_weight(merged.data, scale, dim)

    for dim in (0, 1):
        # Signs: however often the weight is scaled in place, it neither grows nor vanishes.
        scale = torch.randint(2, (weight.shape[dim],), device=settings.device) * 2.0 - 1.0
        fns: _Functions = {
            "ours": partial(ia3_kernels.scale_weight_, weight, scale, dim),
            "eager": partial(merge, scale, dim),
            **_copies(weight.nbytes, settings),
        }
        for name, kernel in _by_backend("scale_weight_", settings, DTYPES[dtype]).items():
            fns[f"ours, {name}"] = partial(kernel, weight, scale, dim)
        times = measure.interleave(fns, settings.rounds(15), warmup=2, device=settings.device)
        case = f"scale_weight_ dim {dim} {rows}x{columns}"
        _add_shares(recorder, case, dtype, times, 2 * weight.nbytes, 2 * weight.nbytes)


# --- the cost of calling at all -----------------------------------------------------------------------------------


def _overhead(settings: Settings, recorder: Recorder, dtype: str) -> None:
    width = 64
    x, up = (torch.randn(1, width, device=settings.device).to(DTYPES[dtype]) for _ in range(2))
    weight = torch.randn(width, width, device=settings.device).to(DTYPES[dtype])
    scale = torch.ones(width, device=settings.device)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "scaled_linear output side": (
            lambda: ia3_kernels.scaled_linear(x, weight, output_scale=scale),
            lambda: eager.scaled_linear(x, weight, output_scale=scale),
        ),
        "scaled_linear input side": (
            lambda: ia3_kernels.scaled_linear(x, weight, input_scale=scale),
            lambda: eager.scaled_linear(x, weight, input_scale=scale),
        ),
        "gated_activation": (
            lambda: ia3_kernels.gated_activation(x, up, scale),
            lambda: eager.gated_activation(x, up, scale),
        ),
        "scaled_activation": (
            lambda: ia3_kernels.scaled_activation(x, scale),
            lambda: eager.scaled_activation(x, scale),
        ),
        "scale_weight_": (
            lambda: ia3_kernels.scale_weight_(weight, scale, 0),
            lambda: eager.scaled_weight(weight, scale, 0),
        ),
    }
    for op, (ours, theirs) in pairs.items():
        fns: _Functions = {"ours": ours, "eager": theirs, "linear": lambda: F.linear(x, weight)}
        times = measure.interleave(
            fns, settings.rounds(40), warmup=200, calls=20 if settings.quick else 1000, device=settings.device
        )
        case = f"call overhead: {op}, 1x{width}"
        recorder.add_times(_SUITE, case, dtype, times, {"ours": ("eager", "linear"), "eager": ("linear",)})
        extra = [a - b for a, b in zip(times["ours"], times["linear"], strict=True)]
        recorder.add(_SUITE, case, dtype, "ours - linear", times=extra)
