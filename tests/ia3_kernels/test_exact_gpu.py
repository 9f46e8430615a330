"""Exact merging by the kernels of GPUs: CUDA's in the emulator, Triton's in its interpreter, both on a GPU.

Whatever they are given, they do bit-exactly what the CPU does, so that the proofs of ``test_exact.py`` hold for them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3_kernels as kernels
from ia3_kernels import Residual, backends, exact, exact_gpu, exact_reference, moves, target
from ia3_kernels.exact import Change, change_, undo_
from ia3_kernels.launches import WeightLaunch

from . import emulated, emulated_bindings
from .helpers import interrupted
from .test_exact import (
    LAYOUTS,
    _binade_borders,
    _every_pattern,
    _hard,
    _patterns,
    _random_bits,
    _same,
    _same_residual,
    _scales,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = DTYPES[1:]
# The interpreter takes a millisecond for what an emulated block takes a microsecond for.
IS_SLOW = target.is_interpreted()
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
    borders = [
        f(torch.tensor(x)) for x in (1.0, 0.5) for f in (lambda t: t.nextafter(2 * t), lambda t: t.nextafter(-t))
    ]
    drawn = _scales(2000)[torch.randperm(2000)]
    return torch.cat([torch.tensor(special), torch.stack(borders), drawn])[:count]


def _widen_triton(monkeypatch: pytest.MonkeyPatch, unit: int) -> None:
    """Give Triton's kernels units so large that the interpreter has few programs to walk through."""
    from ia3_kernels.triton import exact

    kernel = functools.partial(exact.exact_scale, launch=WeightLaunch(4, unit, 1))
    triton = backends.triton.BACKEND
    operators = {**triton.operators, **exact_gpu.operators(kernel, unit)}
    moves = functools.partial(exact_gpu.move_all, kernel, unit)
    changed = dataclasses.replace(triton, operators=operators, moves=moves)
    monkeypatch.setattr(backends, "_BACKENDS", (changed, backends.reference.BACKEND))
    backends.refresh()


# --- the proof ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_every_16_bit_pattern(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged, swapped and unmerged as on the CPU, with scales of every kind; each bit comes back."""
    count = 12 if IS_SLOW else 256 if device == "cuda" else 64
    if IS_SLOW:
        _widen_triton(monkeypatch, 16384)
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


@pytest.mark.parametrize("weights", ["any bits", "borders", "like a model's"])
def test_fp32_weights(weights: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2000 if device == "cpu" else 40000
    if IS_SLOW:
        _widen_triton(monkeypatch, 2048)
    row = {
        "any bits": lambda: _random_bits(size),
        "borders": lambda: _binade_borders()[:: 41472 // size],
        "like a model's": lambda: 0.02 * torch.randn(size),
    }[weights]()
    scale = _chosen_scales(16 if IS_SLOW else 64)
    matrix = row.to(device).repeat(len(scale), 1)
    residual = kernels.merge_(matrix, scale.to(device), exact=True)
    expected, of_cpu = _merged_on_cpu(row.repeat(len(scale), 1), scale, 0)
    assert residual is not None
    assert _same_residual(residual.to("cpu"), of_cpu)
    _assert_merged(matrix, expected)
    kernels.unmerge_(matrix, scale.to(device), 0, residual)
    assert bool((_patterns(matrix.cpu()) == _patterns(row)).all())


# --- shapes and layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 520), (9, 33), (1, 31), (11, 1), (70, 64), (2, 8)][: 4 if IS_SLOW else 6])
def test_shapes(dtype: torch.dtype, shape: tuple[int, int], dim: int, device: str) -> None:
    """Merging, swapping back and forth and unmerging, with escapes all over; what one backend merges another undoes."""
    before = _hard(dtype, *shape)
    scale, other = (_chosen_scales(60)[torch.randperm(60)].repeat(20)[: shape[dim]] for _ in range(2))
    weight = before.clone().to(device)
    residual = kernels.merge_(weight, scale.to(device), dim, exact=True)
    assert residual is not None
    merged, of_cpu = _merged_on_cpu(before, scale, dim)
    assert _same_residual(residual.to("cpu"), of_cpu)
    _assert_merged(weight, merged)
    # The reference undoes what a kernel did, and the other way round.
    given = scale if dim == 0 else scale[None]
    undone = weight.cpu().clone()
    exact_reference.unmerge_exact_(undone, given, dim, *vars(residual.to("cpu")).values())
    assert _same(undone, before)
    from_cpu = merged.to(device)
    kernels.unmerge_(from_cpu, scale.to(device), dim, of_cpu.to(device))
    assert _same(from_cpu.cpu(), before)
    for old, new in ((scale, other), (other, scale), (scale, other))[: 1 if IS_SLOW else 3]:
        residual = kernels.swap_(weight, old.to(device), new.to(device), dim, residual)
        merged, of_cpu = _merged_on_cpu(before, new, dim)
        assert _same_residual(residual.to("cpu"), of_cpu)
        _assert_merged(weight, merged)
    kernels.unmerge_(weight, other.to(device), dim, residual)
    assert _same(weight.cpu(), before)


@pytest.mark.parametrize("dtype", DTYPES[1:2] if IS_SLOW else DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, dim, length = LAYOUTS[layout]()
    base = torch.randn(4000).to(dtype).to(device)
    weight = base.as_strided(drawn.shape, drawn.stride(), 3)  # the same memory in the dtype, and not on 16 bytes
    around, scale = base.clone(), 1 + 0.3 * torch.randn(length)
    scale[::3] = 0.0
    twin = base.clone().cpu().as_strided(drawn.shape, drawn.stride(), 3)
    with monkeypatch.context() as patch:
        patch.setenv(target.BACKEND_VARIABLE, "reference")
        backends.refresh()
        of_cpu = kernels.merge_(twin, scale, dim, exact=True)
    backends.refresh()
    scale = scale.to(device)
    residual = kernels.merge_(weight, scale, dim, exact=True)
    assert residual is not None
    assert of_cpu is not None
    assert _same_residual(residual.to("cpu"), of_cpu)
    _assert_merged(weight, twin)
    kernels.unmerge_(weight, scale, dim, residual)
    assert _same(base.cpu(), around.cpu())  # the weight, and what is around it


def test_a_weight_whose_rows_lie_on_16_bytes_is_read_16_bytes_at_a_time_and_its_neighbours_stay(device: str) -> None:
    for dtype, dim in itertools.product(DTYPES, (0, 1)):
        base = torch.randn(9, 640).to(dtype).to(device)
        weight, around = base[2:-2, 8:-8], base.clone()
        scale = torch.cat([torch.zeros(1), 1 + 0.3 * torch.rand(weight.shape[dim] - 1)])
        expected, of_cpu = _merged_on_cpu(weight, scale, dim)
        residual = kernels.merge_(weight, scale.to(device), dim, exact=True)
        assert residual is not None
        assert _same_residual(residual.to("cpu"), of_cpu)
        _assert_merged(weight, expected)
        kernels.unmerge_(weight, scale.to(device), dim, residual)
        assert _same(base.cpu(), around.cpu())


def test_the_host_asks_once_how_many_escapes_there_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, total_of = [], exact_gpu.total_of
    monkeypatch.setattr(exact_gpu, "total_of", lambda workspace: asked.append(1) or total_of(workspace))
    weight, (first, second) = torch.randn(6, 40).to(device), torch.rand(2, 6).to(device)
    first[2] = second[3] = 0.0
    residual = kernels.merge_(weight, first, exact=True)
    residual = kernels.swap_(weight, first, second, 0, residual)
    assert len(residual.positions) == 40
    assert len(asked) == 2
    kernels.unmerge_(weight, second, 0, residual)
    assert len(asked) == 2


@pytest.mark.parametrize("groups", [1, 2])
def test_a_block_that_visits_many_rows_has_the_factors_of_their_group(groups: int, device: str) -> None:
    if IS_SLOW:
        pytest.skip("its programs visit a block of rows each")
    before = torch.randn(80_000, 8, 1).to(torch.bfloat16)
    scale, other = 0.5 + torch.rand(2, 8 * groups)
    weight = before.to(device, copy=True)
    residual = kernels.merge_(weight, scale.to(device), 1, exact=True)
    expected = before.view(groups, -1, 8).float() * scale.view(groups, 1, 8)
    assert torch.equal(weight.cpu().view(groups, -1, 8), expected.to(torch.bfloat16))
    residual = kernels.swap_(weight, scale.to(device), other.to(device), 1, residual)
    expected = before.view(groups, -1, 8).float() * other.view(groups, 1, 8)
    assert torch.equal(weight.cpu().view(groups, -1, 8), expected.to(torch.bfloat16))
    kernels.unmerge_(weight, other.to(device), 1, residual)
    assert _same(weight.cpu(), before)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (1, 4), (4, 2)])
def test_a_convolution_swaps_between_other_numbers_of_groups(old: int, new: int, device: str) -> None:
    before = torch.randn(8, 3, 3, 3).to(torch.bfloat16)
    first, second = (0.5 + torch.rand(3 * groups) for groups in (old, new))
    weight, expected = before.to(device, copy=True), before.clone()
    residual = kernels.merge_(weight, first.to(device), 1, exact=True)
    residual = kernels.swap_(weight, first.to(device), second.to(device), 1, residual)
    kernels.merge_(expected, second, 1)
    assert _same(weight.cpu(), expected)
    kernels.unmerge_(weight, second.to(device), 1, residual)
    assert _same(weight.cpu(), before)


def test_the_host_asks_once_for_all_weights(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(real: Any, tensor: Tensor) -> Any:
        asked.append(real)
        return real(tensor)

    for name in ("tolist", "__bool__", "item"):
        monkeypatch.setattr(Tensor, name, functools.partialmethod(functools.partial(counted, getattr(Tensor, name))))
    weights = [torch.randn(6, 40).to(torch.bfloat16).to(device) for _ in range(5)]
    first, second = (0.5 + torch.rand(2, 6)).to(device)
    first[2] = 0.0  # whose row escapes whole
    residuals = change_([Change(weight, None, first) for weight in weights])
    assert len(asked) == 1
    change_([Change(weight, first, second, 0, residual) for weight, residual in zip(weights, residuals, strict=True)])
    assert len(asked) == 3  # whether positions ascend, too


# --- finite or not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(9, 33), (5, 512)])
def test_what_would_not_be_finite_is_found(shape: tuple[int, int], dim: int, dtype: torch.dtype, device: str) -> None:
    for weight, scale in ((20.0, math.nan), (20.0, math.inf), (20.0, 1e38), (math.nan, 1.0), (0.0, math.inf)):
        for place in ((shape[0] - 1, shape[1] - 1), (0, 0), (4, 9))[: 1 if IS_SLOW else 3]:
            matrix, factors = torch.randn(shape).to(dtype), torch.ones(shape[dim])
            assert IS_SLOW or kernels.stays_finite(matrix.to(device), factors.to(device), dim)
            matrix[place], factors[place[dim]] = weight, scale
            moved = matrix.to(device)
            with pytest.raises(ValueError, match="would not be finite"):
                kernels.merge_(moved, factors.to(device), dim, exact=True, safe=True)
            assert _same(moved.cpu(), matrix)


# --- what goes wrong ----------------------------------------------------------------------------------------------


def _changes(device: str, dtype: torch.dtype, kind: str) -> tuple[list[Change], list[Tensor]]:
    """Changes of one kind of three weights, of which one has escapes, and the weights."""
    weights = [torch.randn(shape).to(dtype).to(device) for shape in ((4, 9), (3, 300), (2, 8))]
    changes = []
    for number, weight in enumerate(weights):
        first, second = (0.5 + torch.rand(2, weight.shape[number % 2])).to(device)
        if number == 1:
            first[1] = second[2] = 0.0
        residual = None if kind == "merge" else kernels.merge_(weight, first, number % 2, exact=True)
        old, new = {"merge": (None, first), "unmerge": (first, None), "swap": (first, second)}[kind]
        changes.append(Change(weight, old, new, number % 2, residual))
    return changes, weights


@pytest.mark.parametrize("kind", ["merge", "unmerge", "swap"])
def test_many_weights_change_as_one_after_the_other_does(kind: str, device: str) -> None:
    changes, weights = _changes(device, torch.bfloat16, kind)
    alone = [change._replace(weight=change.weight.clone()) for change in changes]
    expected = [change_([change])[0] for change in alone]
    found = change_(changes)
    for one, other, a, b in zip(found, expected, weights, alone, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (other is not None and _same_residual(one, other))
        assert _same(a.cpu(), b.weight.cpu())


@pytest.mark.parametrize("kind", ["merge", "unmerge", "swap"])
def test_an_interrupt_between_any_two_instructions_leaves_all_weights_or_none(kind: str, device: str) -> None:
    if IS_SLOW or device == "cuda":
        pytest.skip("the emulator goes the same way, and takes less time")
    own = tuple(module.__file__ for module in (exact, exact_gpu, moves, backends.cuda))
    outcomes = set()
    for instructions in itertools.count(0, 3):
        torch.manual_seed(0)
        changes, weights = _changes(device, torch.bfloat16, kind)
        before = [weight.clone() for weight in weights]
        done: list[object] = []
        was_interrupted = interrupted(functools.partial(change_, changes, done), instructions, own)
        if done:
            assert not all(map(torch.equal, weights, before))
            undo_(changes, done)
        assert all(map(torch.equal, weights, before))
        outcomes.add((was_interrupted, bool(done)))
        if not was_interrupted:
            break
    assert outcomes >= {(True, False), (False, True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_without_memory_for_escapes_everything_is_as_it_was(
    dim: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.randn(22, 300).to(dtype)
    scale, other = (1 + 0.3 * torch.rand(before.shape[dim]) for _ in range(2))
    scale[:7], other[5:10] = 0.0, 0.0
    scale, other, weight = scale.to(device), other.to(device), before.to(device)

    def fail(workspace: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(exact_gpu, "total_of", fail)
        with pytest.raises(torch.OutOfMemoryError):
            kernels.merge_(weight, scale, dim, exact=True)
    assert _same(weight.cpu(), before)
    residual = kernels.merge_(weight, scale, dim, exact=True)
    merged = weight.clone()
    with monkeypatch.context() as patch:
        patch.setattr(exact_gpu, "total_of", fail)
        with pytest.raises(torch.OutOfMemoryError):
            kernels.swap_(weight, scale, other, dim, residual)
    assert _same(weight.cpu(), merged.cpu())
    kernels.unmerge_(weight, scale, dim, residual)
    assert _same(weight.cpu(), before)


def test_a_residual_of_another_weight_is_refused(device: str) -> None:
    weight, scale = torch.randn(5, 6).to(device), torch.ones(5).to(device)
    scale[0] = 0.0
    residual = kernels.merge_(weight, scale, exact=True)
    assert residual is not None
    merged = weight.clone()
    for positions in (residual.positions + 27, residual.positions.flip(0), residual.positions - 1):
        with pytest.raises(RuntimeError, match="positions are not ascending, or not below 30"):
            kernels.unmerge_(weight, scale, 0, dataclasses.replace(residual, positions=positions))
        assert _same(weight.cpu(), merged.cpu())


def test_the_order_of_blocks_changes_no_bit() -> None:
    if not emulated_bindings.AVAILABLE or target.is_interpreted():
        pytest.skip("there is no emulator")
    weight, scale = _hard(torch.bfloat16, 24, 600), _chosen_scales(24)
    expected, of_cpu = _merged_on_cpu(weight, scale, 0)
    for order in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch, emulated_bindings.backend(patch):
            emulated.library().emulator_set_order(order)
            merged = weight.clone()
            residual = kernels.merge_(merged, scale, exact=True)
            emulated.library().emulator_set_order(0)
        assert residual is not None
        assert _same_residual(residual, of_cpu)
        _assert_merged(merged, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_cuda_graph_captures_no_merging() -> None:
    weight, scale = torch.randn(8, 16, device="cuda"), torch.rand(8, device="cuda")
    residual = kernels.merge_(weight, scale, exact=True)
    merged = weight.clone()
    for call in (
        lambda: kernels.merge_(weight, scale),
        lambda: kernels.merge_(weight, scale, exact=True),
        lambda: kernels.unmerge_(weight, scale, 0, residual),
        lambda: kernels.stays_finite(weight, scale),
    ):
        with (
            pytest.raises(RuntimeError, match="a CUDA graph is being captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            call()
    assert _same(weight.cpu(), merged.cpu())
