"""Exact merging where something is wrong: bad arguments, errors half-way, no memory. The weight is as it was."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import ia3_kernels as kernels
from ia3_kernels import Residual, backends, exact_reference
from ia3_kernels.exact import Change, change_, undo_

from .helpers import needs_native
from .test_exact import DTYPES, _same, _scales

ops = torch.ops.ia3

# --- what is wrong is said, and changes nothing ------------------------------------------------------------------

W = torch.randn(5, 6)
R = Residual(torch.zeros(5, 1, dtype=torch.uint8), torch.tensor([3]), torch.zeros(1, dtype=torch.int32))
NARROW, BEYOND = replace(R, parity=R.parity[:4]), replace(R, positions=R.positions + 27)
SHORT = replace(R, bits=R.bits.short())
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: kernels.merge_(W, torch.ones(6)), r"merge_: scale has shape \[6\]; expected \[5\], for a weight \[5, 6\]"),
    (lambda: kernels.merge_(W, torch.ones(5), 1), r"scale has shape \[5\]; expected \[6\]"),
    (lambda: kernels.merge_(W, torch.ones(12), 1), r"scale has shape \[12\]; expected \[6\]"),
    (lambda: kernels.merge_(W, torch.ones(1, 5, 1)), r"scale has shape \[1, 5, 1\]; expected \[5\]"),
    (lambda: kernels.merge_(W[0, :1].expand(4), torch.ones(4)), r"rows of weight overlap in memory"),
    (lambda: kernels.merge_(W[:, :1].expand(5, 6), torch.ones(5)), r"weight has strides \[6, 0\]; .*copy it first"),
    (lambda: kernels.merge_(W[0, :5, None].expand(5, 6), torch.ones(5)), r"rows of weight overlap in memory"),
    (lambda: kernels.merge_(W[:, :5], W[0, :5], exact=True), r"merge_: scale shares memory with weight"),
    (lambda: kernels.merge_(W, W[:, 1]), r"merge_: scale shares memory with weight"),
    (lambda: kernels.merge_(W[0], W[0]), r"merge_: scale shares memory with weight"),
    (
        lambda: kernels.unmerge_(W, torch.ones(5)),
        r"unmerge_: residual is None; expected what merge_ returns with exact",
    ),
    (
        lambda: kernels.unmerge_(W, torch.ones(5), 0, R.to("meta")),
        r"unmerge_: residual is on meta, but weight is on cpu",
    ),
    (
        lambda: kernels.swap_(W, torch.ones(5), torch.ones(5), 0, R.to("meta")),
        r"swap_: residual is on meta, but weight is on",
    ),
    (lambda: kernels.merge_(W, torch.ones(5), 2), r"dim is 2; expected 0 .* or 1"),
    (lambda: kernels.merge_(W[0], torch.ones(6), 1), r"weight has shape \[6\] and dim is 1; expected"),
    (lambda: kernels.merge_(W, torch.ones(5).int()), r"scale has dtype torch.int32; expected a floating-point dtype"),
    (lambda: kernels.merge_(W.int(), torch.ones(5)), r"weight has dtype torch.int32; expected one of"),
    (lambda: kernels.merge_(W.to("meta"), torch.ones(5)), r"weight is on the meta device.*load it first"),
    (lambda: kernels.merge_(W, torch.ones(5, device="meta")), r"scale is on meta, but weight is on cpu"),
    (lambda: kernels.merge_(W[::2, ::2], torch.ones(3), exact=True), r"weight has strides \[12, 2\]; .*copy it first"),
    (lambda: kernels.merge_(W[:1].expand(5, 6), torch.ones(5)), r"rows of weight overlap in memory"),
    (lambda: kernels.merge_(torch.ones(6, 4, 3, 3), torch.ones(16), 1), r"scale has shape \[16\]; expected \[4\]"),
    (lambda: kernels.merge_(torch.ones(6, 4, 3, 3)[:, :, ::2], torch.ones(4), 1), r"contiguous or channels_last"),
    (lambda: kernels.unmerge_(W, torch.ones(6), 0, R), r"unmerge_: scale has shape \[6\]"),
    (
        lambda: kernels.unmerge_(W, torch.ones(5), 0, Residual(R.parity[:4], *(R.positions, R.bits))),
        r"parity is .*uint8",
    ),
    (lambda: kernels.unmerge_(W, torch.ones(5), 0, SHORT), r"positions and bits are"),
    (
        lambda: kernels.unmerge_(W, torch.ones(5), 0, Residual(R.parity, R.positions + 27, R.bits)),
        r"positions.*below 30",
    ),
    (lambda: kernels.swap_(W, torch.ones(5), torch.ones(6), 0, R), r"swap_: new_scale has shape \[6\]"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_arguments_get_a_sentence(case: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and backends.native.BACKEND.unavailable():
        pytest.skip("the native library is not built")
    call, message = BAD[case]
    before = W.clone()
    monkeypatch.setenv("IA3_BACKEND", backend)
    with pytest.raises(RuntimeError, match=message):
        call()
    assert torch.equal(W, before)


def test_a_shard_of_a_weight_is_refused() -> None:
    """As a DTensor says of itself, without a group of processes."""

    class Sharded(Tensor):
        def to_local(self) -> Tensor:
            raise AssertionError("nobody asked")

    weight, scale = W.clone(), torch.rand(5)
    for call in (
        lambda: kernels.merge_(weight.as_subclass(Sharded), scale),
        lambda: kernels.merge_(weight, scale.as_subclass(Sharded), exact=True),
        lambda: kernels.stays_finite(weight.as_subclass(Sharded), scale),
    ):
        with pytest.raises(RuntimeError, match=r"is a Sharded, of which this process holds a shard; merge before"):
            call()
    assert torch.equal(weight, W)


def test_a_captured_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a tensor on a GPU says; the GPU's own tests capture a real graph."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight = W.clone()
    with pytest.raises(RuntimeError, match=r"merge_: a CUDA graph is being captured, .*; merge before it"):
        kernels.merge_(weight, torch.rand(5))
    assert torch.equal(weight, W)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("weight", "scale"), [(20.0, math.nan), (20.0, math.inf), (20.0, 1e38), (math.nan, 1.0), (0.0, math.inf)]
)
def test_safe_merging_finds_what_would_not_be_finite_and_writes_nothing(
    dtype: torch.dtype, dim: int, weight: float, scale: float
) -> None:
    if dtype == torch.float64 and scale == 1e38:
        pytest.skip("fp64 holds it")
    for place in ((0, 0), (40, 9), (69, 32)):
        matrix, factors = torch.randn(70, 33).to(dtype), torch.ones((70, 33)[dim])
        kernels.merge_(matrix, factors, dim, safe=True)
        matrix[place], factors[place[dim]] = weight, scale
        before = matrix.clone()
        for is_exact in (False, True):
            with pytest.raises(ValueError, match=r"would not be finite in \w+; .*nothing was written"):
                kernels.merge_(matrix, factors, dim, exact=is_exact, safe=True)
        assert not kernels.stays_finite(matrix, factors, dim)
        assert _same(matrix, before)


def test_safe_merging_looks_at_the_products_only() -> None:
    weight = torch.full((4, 5), 1e-30)
    weight[:, 0] = 1e30
    assert kernels.merge_(weight, torch.tensor([1.0, 1e30, 1.0, 1e38, 1.0]), 1, safe=True) is None


@pytest.mark.parametrize("op", ["merge_exact_", "unmerge_exact_", "swap_exact_", "stays_finite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    weight, scale = torch.randn(4, 9).to(dtype), torch.randn(4)
    merged = weight.clone()
    residual = ops.merge_exact_(merged, scale, 0)
    opcheck(
        getattr(ops, op),
        {
            "merge_exact_": (weight, scale, 0),
            "unmerge_exact_": (merged, scale, 0, *residual),
            "swap_exact_": (merged, scale, 1 / scale, 0, *residual),
            "stays_finite": (weight, scale, 0),
        }[op],
    )


def test_autograd_is_told_of_the_write() -> None:
    weight, scale = torch.randn(3, 4), torch.randn(3)
    versions = [weight._version]
    residual = kernels.merge_(weight, scale, exact=True)
    versions.append(weight._version)
    assert residual is not None
    residual = kernels.swap_(weight, scale, 2 * scale, 0, residual)
    versions.append(weight._version)
    kernels.unmerge_(weight, 2 * scale, 0, residual)
    versions.append(weight._version)
    assert versions == sorted(set(versions))
    with pytest.raises(RuntimeError, match=r"merge_exact_: .*call it under torch.no_grad\(\)"):
        ops.merge_exact_(weight, scale.requires_grad_(), 0)
    kernels.merge_(weight, scale)  # looks at the values only, as an optimizer does


# --- errors half-way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 5])
@pytest.mark.parametrize("operation", ["merge", "unmerge", "swap"])
def test_the_reference_goes_back_after_an_error(operation: str, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_reference, "_CPU_BLOCK", 64)
    weight, scale, other = torch.randn(40, 16), _scales(400)[:40], 1 + torch.rand(40)
    residual = exact_reference.merge_exact_(weight, scale, 0) if operation != "merge" else ()
    before = weight.clone()
    name = "_unmerge_rows" if operation == "unmerge" else "_merge_rows"
    step, calls = getattr(exact_reference, name), 0

    def fail(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(exact_reference, name, fail)
    with pytest.raises(KeyboardInterrupt):
        {
            "merge": lambda: exact_reference.merge_exact_(weight, scale, 0),
            "unmerge": lambda: exact_reference.unmerge_exact_(weight, scale, 0, *residual),
            "swap": lambda: exact_reference.swap_exact_(weight, scale, other, 0, *residual),
        }[operation]()
    assert calls > failing
    assert torch.equal(weight.nan_to_num(7.0), before.nan_to_num(7.0))
    if residual:
        exact_reference.unmerge_exact_(weight, scale, 0, *residual)
        assert weight.isfinite().all()


# In a process of its own, whose memory can be limited: a scale of zeros makes an escape of every weight.
_OUT_OF_MEMORY = """
import resource, torch, ia3_kernels as kernels
weight, old = torch.randn(8000, 4000).bfloat16(), 1 + 0.2 * torch.randn(8000)
residual = kernels.merge_(weight, old, exact=True)
before, zeros = weight.clone(), torch.zeros(8000)
zeros[:100] = 1.5
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20),) * 2)
for operation in (
    lambda: kernels.merge_(weight, zeros, exact=True),
    lambda: kernels.swap_(weight, old, zeros, 0, residual),
):
    try:
        operation()
    except (MemoryError, RuntimeError) as error:
        print("whole" if torch.equal(weight, before) else "torn", type(error).__name__)
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_running_out_of_memory_half_way_leaves_the_weight_whole() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OUT_OF_MEMORY],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split()[::2] == ["whole", "whole"], done.stdout + done.stderr


# --- many weights at once -----------------------------------------------------------------------------------------


def test_changes_that_make_no_sense_get_a_sentence() -> None:
    weight, scale = torch.randn(5, 6), torch.rand(5) + 0.5
    before = weight.clone()
    residual = kernels.merge_(weight.clone(), scale, exact=True)
    for changes, done, sentence in (
        ([Change(weight, None, None)], [], "neither an old scale nor a new one is given"),
        ([Change(weight, None, scale, 0, residual)], [], "a residual is given without the old scale"),
        ([Change(weight, None, scale)], [None], "done holds something already"),
        ([Change(weight, None, scale), Change(weight, None, scale[:4])], [], r"scale has shape \[4\]"),
        ([Change(weight, scale, None)], [], "residual is None; expected what merge_ returns"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            change_(changes, done)
        assert torch.equal(weight, before)
    assert change_([]) == []


def test_what_is_undone_is_undone_in_reverse() -> None:
    # Twice the same weight, which nobody should give, shows the order.
    weight, scales = torch.randn(9, 64).to(torch.bfloat16), torch.rand(2, 9) + 0.5
    before = weight.clone()
    done: list[Any] = []
    changes = [Change(weight, None, scale) for scale in scales]
    change_(changes, done)
    undo_(changes, done)
    assert torch.equal(weight, before)


# --- memory ------------------------------------------------------------------------------------------------------


def _peak_kib(function: Callable[[], Any]) -> tuple[int, Any]:
    """How far resident memory rises above where it is now, while the function runs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset here")

    def read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])

    before = read("VmRSS:")
    result = function()
    return read("VmHWM:") - before, result


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and backends.native.BACKEND.unavailable():
        pytest.skip("the native library is not built")
    monkeypatch.setenv("IA3_BACKEND", request.param)
    return str(request.param)


@pytest.mark.parametrize("dim", [0, 1])
def test_no_temporary_of_the_weights_size(backend: str, dim: int) -> None:
    rows = 8192 if backend == "native" else 1024
    weight = torch.ones(rows, 4096, dtype=torch.bfloat16)
    scale = 1 + 0.2 * torch.randn(weight.shape[dim])
    residual = kernels.merge_(weight, scale, dim, exact=True)  # once, for what a first call allocates for good
    assert residual is not None
    kernels.unmerge_(weight, scale, dim, residual)
    weight_kib = weight.nbytes >> 10
    assert weight_kib >= 8 << 10

    def cycle() -> tuple[int, int, int]:
        merging, merged = _peak_kib(lambda: kernels.merge_(weight, scale, dim, exact=True, safe=True))
        swapping, swapped = _peak_kib(lambda: kernels.swap_(weight, scale, 2 * scale, dim, merged))
        unmerging, _ = _peak_kib(lambda: kernels.unmerge_(weight, 2 * scale, dim, swapped))
        return merging - (merged.nbytes >> 10), swapping, unmerging

    # The least of three: what the process has beside, and the system's own counting, come and go.
    for peaks in zip(*(cycle() for _ in range(3)), strict=True):
        assert min(peaks) < 1024
    assert bool((weight == 1).all())
