"""How this project measures: interleaved times, paired ratios, bytes kept for backward, and measured ceilings."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def round_order(names: Sequence[str], index: int) -> list[str]:
    """The order in which round `index` runs `names`.

    Every second round runs backwards, so that a steady drift of the machine cancels out. That makes the last of one
    round the first of the next, with its data still in cache; every two rounds the start moves on by one, so that over
    `2 * len(names)` rounds every implementation has that advantage equally often.
    """
    shift = index // 2 % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if index % 2 else order


def synchronize(device: str | torch.device = "cpu") -> None:
    """Waits until `device` has done what it was given; the CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    fns: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    *,
    calls: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Times each of `fns` once a round, in turns, in this process.

    Returns, for each name, `rounds` times in seconds of one call; entry i of every list comes from round i, so lists
    can be compared pairwise (`paired_ratio`). `warmup` untimed rounds come first: compilation belongs there. Each time
    is the mean of `calls` calls in a row, for calls too short for the clock. Raises ValueError if `fns` is empty or a
    count is out of range.
    """
    if not fns or rounds < 1 or warmup < 0 or calls < 1:
        raise ValueError(
            f"interleave got {len(fns)} functions, rounds={rounds}, warmup={warmup}, calls={calls}; "
            "give at least one function, one round and one call, and no negative warmup"
        )
    names = list(fns)
    for index in range(warmup):
        for name in round_order(names, index):
            fns[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whichever call it interrupts
    try:
        for index in range(rounds):
            for name in round_order(names, index):
                fn = fns[name]
                synchronize(device)
                start = time.perf_counter()
                for _ in range(calls):
                    fn()
                synchronize(device)
                times[name].append((time.perf_counter() - start) / calls)
    finally:
        if collecting:
            gc.enable()
    return times


def captured(fn: Callable[[], object], calls: int) -> Callable[[], object]:
    """A function that runs `calls` calls of `fn` on the current GPU from one CUDA graph, without Python between them.

    What a kernel of a few microseconds takes cannot be seen past the time that launching it from Python takes. The
    function keeps `fn` alive, and so the tensors that it closes over, whose addresses the graph has written down.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()  # compiles and chooses, which a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            fn()

    def replay(kept: object = fn) -> None:
        graph.replay()

    return replay


def kernels_of(step: Callable[[], object]) -> tuple[float, int]:
    """Seconds that a step's kernels take on the GPU, and how many there are."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        synchronize("cuda")
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time_total for event in kernels) * 1e-6, len(kernels)


def interquartile_range(values: Sequence[float]) -> float:
    """The distance between the first and the third quartile; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over the rounds of `numerator[i] / denominator[i]`.

    A slow moment of the machine touches both values of its round, so this varies less than a ratio of two medians.
    Raises ValueError if the two differ in length or are empty.
    """
    if not numerator or len(numerator) != len(denominator):
        raise ValueError(
            f"paired_ratio got {len(numerator)} and {len(denominator)} times; give both from the same rounds"
        )
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


class _Kept:
    """What autograd holds in place of a saved tensor; alive exactly as long as the graph that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(fn: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of memory that the graph of `fn()` keeps alive for backward when `fn` returns.

    Counts each storage once and whole (a saved view keeps all of its storage alive), and none of the storages of
    `exclude`: give it the parameters, buffers and inputs, which live anyway. `fn` runs a forward and returns what holds
    its graph (the loss, the output); what the graph had dropped by then is not counted. Tensors that an
    autograd.Function hides in attributes of its context, past `save_for_backward`, cannot be seen.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor.detach())  # the tensor itself may hold its graph, which would then never die
        kept.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = fn()
    storages = {
        storage.data_ptr(): storage.nbytes() for storage in (holder.tensor.untyped_storage() for holder in kept)
    }
    del result  # held until here: without it the graph, and all that it keeps, would be gone
    return sum(nbytes for pointer, nbytes in storages.items() if pointer and pointer not in known)


@dataclass(frozen=True)
class Ceiling:
    """What the machine can do at best, measured: `work` (bytes or floating-point operations) in each of `times`."""

    work: int
    times: list[float]

    @property
    def rate(self) -> float:
        """Bytes, or floating-point operations, a second."""
        return self.work / statistics.median(self.times)


def copy_function(nbytes: int, device: str | torch.device = "cpu") -> Callable[[], object]:
    """A function that copies one tensor of `nbytes` bytes into another, so moves `2 * nbytes` bytes."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(nbytes: int, *, device: str | torch.device = "cpu", rounds: int = 20) -> Ceiling:
    """Measures copying a tensor of `nbytes` bytes into another; the rate counts bytes read and bytes written."""
    copies = {"copy": copy_function(nbytes, device)}
    return Ceiling(2 * nbytes, interleave(copies, rounds, warmup=3, device=device)["copy"])


def matmul_rate(
    dtype: torch.dtype, *, size: int = 2048, device: str | torch.device = "cpu", rounds: int = 5
) -> Ceiling:
    """Measures torch's matmul of two square matrices of `size`, `2 * size**3` floating-point operations."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    matmuls = {"matmul": lambda: torch.matmul(left, right, out=out)}
    return Ceiling(2 * size**3, interleave(matmuls, rounds, warmup=2, device=device)["matmul"])
