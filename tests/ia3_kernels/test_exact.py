"""Scaling that is undone bit-exactly: every 16-bit pattern, any fp32 one, every layout, and whatever goes wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ia3_kernels as kernels
from ia3_kernels import Residual, backends, exact_reference

from .helpers import needs_native

ops = torch.ops.ia3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = (torch.bfloat16, torch.float16)
NATIVE = DTYPES[:3]


def _patterns(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_patterns(a), _patterns(b))


def _same_residual(a: Residual, b: Residual) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("parity", "positions", "bits"))


def _every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def _scales(count: int) -> Tensor:
    """Vectors as training leaves them, mantissas and exponents of all kinds, and everything that is special."""
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 2**-126, 2**-127, 2.0**126, 2.0**127, 3e38]
    powers = torch.tensor([2.0**e for e in range(-30, 31)])
    near_powers = torch.cat([powers, powers.nextafter(torch.tensor(math.inf)), powers.nextafter(torch.tensor(0.0))])
    fixed = torch.cat([torch.tensor(special), near_powers, -near_powers])
    rest = count - len(fixed)
    likely = 1 + 0.2 * torch.randn(rest // 2)
    mantissas = 1 + torch.arange(rest // 4) / (rest // 4)
    any_bits = torch.randint(-(2**31), 2**31, (rest - rest // 2 - rest // 4,)).to(torch.int32).view(torch.float32)
    return torch.cat([fixed, likely, mantissas, any_bits])


def _is_normal(tensor: Tensor) -> Tensor:
    return tensor.isfinite() & (tensor.abs() >= torch.finfo(tensor.dtype).smallest_normal)


def _is_promised(weight: Tensor, merged: Tensor, scale: Tensor) -> Tensor:
    """Where the theorem of docs/exact-merging.md says that the parity is enough."""
    # The smallest normal number is also what the largest subnormal products round to.
    is_far = merged.abs() > torch.finfo(merged.dtype).smallest_normal
    return _is_normal(weight) & _is_normal(merged) & is_far & _is_normal(scale) & _is_normal(1 / scale)


# --- the proof ---------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_every_16_bit_pattern_comes_back_for_thousands_of_scales(dtype: torch.dtype) -> None:
    every = _every_pattern(dtype)
    for scale in _scales(4096).split(128):
        matrix = every.repeat(len(scale), 1)
        residual = kernels.merge_(matrix, scale, exact=True)
        assert residual is not None
        row, column = residual.positions // len(every), residual.positions % len(every)
        weight, merged, factor = every[column], matrix.view(-1)[residual.positions], scale[row]
        assert torch.equal(residual.bits, _patterns(weight))
        promised = _is_promised(weight, merged, factor)
        assert not promised.any(), (weight[promised][:3], factor[promised][:3])
        kernels.unmerge_(matrix, scale, 0, residual)
        assert bool((_patterns(matrix) == _patterns(every)).all())


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_merged_values_are_the_product_in_fp32_rounded_once(dtype: torch.dtype) -> None:
    every, scale = _every_pattern(dtype), _scales(512)
    matrix = every.repeat(len(scale), 1)
    kernels.merge_(matrix, scale, exact=True)
    expected = (every.float() * scale[:, None]).to(dtype)
    assert torch.equal(matrix.isnan(), expected.isnan())
    assert _same(matrix.masked_fill(expected.isnan(), 0), expected.masked_fill(expected.isnan(), 0))


def _random_bits(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32).view(torch.float32)


def _binade_borders() -> Tensor:
    """Patterns on both sides of every power of two, where the spacing of numbers changes."""
    powers = torch.arange(256, dtype=torch.int64) << 23
    near = (powers[:, None] + torch.arange(-40, 41)).clamp(0, 2**31 - 1).flatten()
    return torch.cat([near, near - 2**31]).to(torch.int32).view(torch.float32)


@needs_native
@pytest.mark.parametrize("weights", ["any bits", "borders", "like a model's"])
def test_fp32_weights_come_back(weights: str) -> None:
    scale = _scales(512)
    row = {
        "any bits": lambda: _random_bits(40000),
        "borders": _binade_borders,
        "like a model's": lambda: 0.02 * torch.randn(40000),
    }[weights]()
    for part in scale.split(64):
        matrix = row.repeat(len(part), 1)
        residual = kernels.merge_(matrix, part, exact=True)
        assert residual is not None
        weight, factor = row[residual.positions % len(row)], part[residual.positions // len(row)]
        assert not _is_promised(weight, matrix.view(-1)[residual.positions], factor).any()
        expected = row * part[:, None]
        assert torch.equal(matrix.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))
        kernels.unmerge_(matrix, part, 0, residual)
        assert bool((_patterns(matrix) == _patterns(row)).all())


def test_fp32_scales_at_the_worst_of_two_mantissas() -> None:
    # w' has the smallest mantissa and w the largest, or they are one ulp from it: the widest preimages there are.
    ulps = torch.arange(0, 200, dtype=torch.int32)
    large = (torch.tensor(2.0).view(torch.int32) - 1 - ulps).view(torch.float32)
    small = (torch.tensor(1.0).view(torch.int32) + ulps).view(torch.float32)
    scale = (small[:, None].double() / large.double()).float().unique()
    scale = torch.cat([scale, scale.nextafter(torch.tensor(2.0)), scale.nextafter(torch.tensor(0.0))])
    matrix = torch.cat([large, small]).repeat(len(scale), 1)
    before = matrix.clone()
    residual = kernels.merge_(matrix, scale, exact=True)
    assert residual is not None
    assert not len(residual.positions)
    shared = _patterns(matrix).diff(dim=1).eq(0).sum()
    assert int(shared) > 1000  # the parity has work to do
    kernels.unmerge_(matrix, scale, 0, residual)
    assert _same(matrix, before)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_models_weights_need_one_bit_each(dtype: torch.dtype, dim: int) -> None:
    weight = (0.02 * torch.randn(256, 1024)).to(dtype)
    before = weight.clone()
    scale = 1 + 0.2 * torch.randn(weight.shape[dim])
    residual = kernels.merge_(weight, scale, dim, exact=True)
    assert residual is not None
    assert residual.parity.shape == (256, 128)
    assert residual.nbytes == weight.numel() // 8 + len(residual.positions) * (8 + weight.itemsize)
    # 2^-14 is fp16's smallest normal number: the others have none of these weights below theirs.
    escaped = before.view(-1)[residual.positions]
    assert bool((escaped.abs().double() < 2**-13).all()) if dtype == torch.float16 else not len(escaped)
    assert residual.nbytes * 8 <= 1.01 * weight.numel()
    kernels.unmerge_(weight, scale, dim, residual)
    assert _same(weight, before)


# --- every backend alike -----------------------------------------------------------------------------------------


def _hard(dtype: torch.dtype, rows: int, cols: int) -> Tensor:
    weight = torch.randn(rows, cols).mul(0.02).to(dtype)
    anything = torch.randint(-(2**15), 2**15, (rows * cols // 4,)).to(torch.int16).view(torch.bfloat16).to(dtype)
    weight.view(-1)[: len(anything)] = anything
    return weight


@needs_native
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("shape", [(300, 1000), (37, 33), (1, 31), (31, 1), (9, 64), (2, 8)])
def test_native_kernels_and_reference_agree_to_the_bit(dtype: torch.dtype, shape: tuple[int, int], dim: int) -> None:
    weight = _hard(dtype, *shape)
    scale, other = (_scales(2000)[torch.randperm(2000)][: shape[dim]] for _ in range(2))
    ours, theirs = weight.clone(), weight.clone()
    as_given = (scale, other) if dim == 0 else (scale[None], other[None])
    mine = kernels.merge_(ours, scale, dim, exact=True)
    assert mine is not None
    reference = Residual(*exact_reference.merge_exact_(theirs, as_given[0], dim))
    assert _same_residual(mine, reference)
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    mine = kernels.swap_(ours, scale, other, dim, reference)
    swapped = Residual(
        reference.parity, *exact_reference.swap_exact_(theirs, *as_given, dim, *vars(reference).values())
    )
    assert _same_residual(mine, swapped)
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    # What one has merged, the other undoes.
    kernels.unmerge_(theirs, other, dim, swapped)
    exact_reference.unmerge_exact_(ours, as_given[1], dim, mine.parity, mine.positions, mine.bits)
    assert _same(theirs, weight)
    assert _same(ours, weight)


@needs_native
@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_native_kernels_and_reference_agree_on_every_16_bit_pattern(dtype: torch.dtype) -> None:
    scale = _scales(1000)[torch.randperm(1000)][:40]
    ours, theirs = (_every_pattern(dtype).repeat(len(scale), 1) for _ in range(2))
    mine = kernels.merge_(ours, scale, exact=True)
    assert mine is not None
    assert _same_residual(mine, Residual(*exact_reference.merge_exact_(theirs, scale, 0)))
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    kernels.unmerge_(ours, scale, 0, mine)
    assert bool((_patterns(ours) == _patterns(_every_pattern(dtype))).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    weight, scale = _hard(dtype, 300, 1000), _scales(400)[:300]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            merged = weight.clone()
            results.append((merged, kernels.merge_(merged, scale, exact=True)))
    finally:
        torch.set_num_threads(threads)
    for merged, residual in results[1:]:
        assert _same(merged, results[0][0])
        assert residual is not None
        assert results[0][1] is not None
        assert _same_residual(residual, results[0][1])
        assert bool((residual.positions.diff() > 0).all())


@needs_native
@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_flushing_subnormals_changes_nothing(dtype: torch.dtype) -> None:
    weight, scale = _hard(dtype, 30, 100), _scales(400)[:30]
    merged, flushed = weight.clone(), weight.clone()
    residual = kernels.merge_(merged, scale, exact=True)
    assert residual is not None
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        again = kernels.merge_(flushed, scale, exact=True)
        assert again is not None
        assert _same_residual(residual, again)
        assert _same(merged, flushed)
        kernels.unmerge_(merged, scale, 0, residual)
    finally:
        torch.set_flush_denormal(False)
    assert _same(merged, weight)


# --- cycles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_thousand_cycles_with_changing_vectors_leave_every_bit(dtype: torch.dtype) -> None:
    cycles = 10_000 if backends.choose("merge_exact_", "cpu", dtype)[0].name == "native" else 300
    weight = torch.randn(24, 40).mul(0.02).to(dtype)
    before = weight.clone()
    scales = 1 + 0.2 * torch.randn(cycles, 24)
    for scale in scales.unbind():
        residual = kernels.merge_(weight, scale, exact=True)
        assert residual is not None
        kernels.unmerge_(weight, scale, 0, residual)
    assert _same(weight, before)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapping_is_unmerging_and_merging(dtype: torch.dtype, dim: int) -> None:
    before = _hard(dtype, 50, 70)
    weight, scales = before.clone(), _scales(1000).view(-1, 10)[:, :1].repeat(1, 70) + 0.1 * torch.randn(100, 70)
    scales[3, 5], scales[7, 2] = 0.0, math.inf
    scales = scales[:20, : before.shape[dim]].contiguous()
    residual = kernels.merge_(weight, scales[0], dim, exact=True)
    for old, new in itertools.pairwise(scales):
        assert residual is not None
        residual = kernels.swap_(weight, old, new, dim, residual)
        fresh = before.clone()
        expected = kernels.merge_(fresh, new, dim, exact=True)
        assert expected is not None
        assert _same_residual(residual, expected)
        assert torch.equal(weight.nan_to_num(7.0), fresh.nan_to_num(7.0))
    assert residual is not None
    kernels.unmerge_(weight, scales[-1], dim, residual)
    assert _same(weight, before)


# --- layouts -----------------------------------------------------------------------------------------------------


def _conv(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
    """The definition, channel by channel."""
    result = weight.clone()
    out, inputs = weight.shape[:2]
    groups = len(scale) // inputs if dim == 1 else 1
    for row in range(out):
        for column in range(inputs):
            factor = scale[row] if dim == 0 else scale[row // (out // groups) * inputs + column]
            result[row, column] *= factor
    return result


LAYOUTS: dict[str, Callable[[], tuple[Tensor, int, int]]] = {  # weight, dim, length of the scale
    "rows": lambda: (torch.randn(20, 50), 0, 20),
    "columns": lambda: (torch.randn(20, 50), 1, 50),
    "rows, transposed": lambda: (torch.randn(50, 20).t(), 0, 20),
    "columns, transposed": lambda: (torch.randn(50, 20).t(), 1, 50),
    "rows of a slice": lambda: (torch.randn(20, 90)[:, 7:57], 0, 20),
    "columns of a transposed slice": lambda: (torch.randn(50, 31)[:, :20].t(), 1, 50),
    "one row": lambda: (torch.randn(1, 50), 1, 50),
    "one column": lambda: (torch.randn(50, 1), 0, 50),
    "one column of a slice": lambda: (torch.randn(50, 3)[:, 1:2], 0, 50),
    "a bias": lambda: (torch.randn(50), 0, 50),
    "a strided bias": lambda: (torch.randn(50, 3)[:, 1], 0, 50),
    "one weight": lambda: (torch.randn(1, 1), 1, 1),
    "no rows": lambda: (torch.randn(0, 5), 0, 0),
    "no columns": lambda: (torch.randn(5, 0), 0, 5),
    "no bias": lambda: (torch.randn(0), 0, 0),
    "conv2d, outputs": lambda: (torch.randn(6, 4, 3, 3), 0, 6),
    "conv2d, inputs": lambda: (torch.randn(6, 4, 3, 3), 1, 4),
    "conv2d, inputs in two groups": lambda: (torch.randn(6, 4, 3, 3), 1, 8),
    "depthwise": lambda: (torch.randn(12, 1, 5, 5), 1, 6),
    "conv2d of 1 x 1": lambda: (torch.randn(6, 4, 1, 1), 1, 4),
    "conv3d, inputs in three groups": lambda: (torch.randn(6, 4, 2, 3, 2), 1, 12),
    "channels_last, outputs": lambda: (torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last), 0, 6),
    "channels_last, groups": lambda: (torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last), 1, 8),
    "convolution without channels": lambda: (torch.randn(0, 4, 3, 3), 1, 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    drawn, dim, length = LAYOUTS[layout]()
    # The same memory in the dtype: `to` would make it contiguous.
    base = torch.randn(4000).to(dtype)
    weight = base.as_strided(drawn.shape, drawn.stride(), 3)
    before, around = weight.clone(), base.clone()
    scale = 1 + 0.3 * torch.randn(length)
    wide = weight.double() if dtype == torch.float64 else weight.float()
    if weight.dim() > 2:
        expected = _conv(wide, scale, dim).to(dtype)
    else:
        expected = (wide * (scale if weight.dim() == 1 or dim == 1 else scale[:, None])).to(dtype)
    residual = kernels.merge_(weight, scale, dim, exact=True)
    assert _same(weight, expected)
    assert residual is not None
    kernels.unmerge_(weight, scale, dim, residual)
    assert _same(weight, before)
    assert _same(base, around)
    assert kernels.merge_(weight, scale, dim, safe=True) is None
    assert _same(weight, expected)
    # Nothing outside of the view was written.
    weight.copy_(before)
    assert _same(base, around)


def test_a_weight_and_its_scale_may_be_parts_of_one_buffer() -> None:
    buffer = torch.randn(35)
    weight, scale = buffer[:30].view(5, 6), buffer[30:]
    expected = weight * scale[:, None]
    kernels.merge_(weight, scale, exact=True)
    assert _same(weight, expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_vectors_as_peft_stores_them_merge_as_vectors(dim: int) -> None:
    weight = torch.randn(5, 6)
    scale = torch.randn(weight.shape[dim])
    merged = weight * (scale[:, None] if dim == 0 else scale)
    for shape in ((-1,), (1, -1), (-1, 1)):
        stored, copy = scale.view(shape), weight.clone()
        assert _same(kernels.scale_weight_(weight.clone(), stored, dim), merged)
        residual = kernels.merge_(copy, stored, dim, exact=True)
        assert _same(copy, merged)
        kernels.unmerge_(copy, stored, dim, residual)
        assert _same(copy, weight)


def test_all_ways_of_scaling_say_the_same_of_the_same_mistake() -> None:
    weight = torch.randn(5, 6)
    mistakes = [(torch.ones(6), 0), (torch.ones(5), 1), (torch.ones(5), 2), (torch.ones(5).int(), 0)]
    for scale, dim in mistakes:
        said = set()
        for name in ("scale_weight_", "merge_", "unmerge_", "stays_finite"):
            with pytest.raises(RuntimeError) as error:
                getattr(kernels, name)(weight, scale, dim)
            said.add(str(error.value).partition(": ")[2].partition("\n")[0])
        assert len(said) == 1, said


@pytest.mark.parametrize("freed", ["weight", "scale", "parity", "positions", "bits"])
def test_a_tensor_whose_memory_was_freed_is_refused(freed: str) -> None:
    weight, scale = torch.randn(5, 6), torch.ones(5)
    scale[0] = 0  # needs positions and bits
    residual = kernels.merge_(weight, scale, exact=True)
    tensors = {"weight": weight, "scale": scale, **vars(residual)}
    tensors[freed].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        kernels.unmerge_(weight, scale, 0, residual)
    if freed in ("weight", "scale"):
        for is_exact in (False, True):
            with pytest.raises(RuntimeError):
                kernels.merge_(weight, scale, exact=is_exact)
        with pytest.raises(RuntimeError):
            kernels.stays_finite(weight, scale)


class _Seen(TorchDispatchMode):
    """Notes which of this package's operators were dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ia3":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators_and_nothing_else_is_different() -> None:
    weight, scale, other = torch.randn(5, 6), torch.rand(5) + 0.5, torch.rand(5) + 0.5
    twin = weight.clone()

    def run(weight: Tensor) -> list[Tensor]:
        steps = [weight.clone(), torch.tensor(kernels.stays_finite(weight, scale))]
        residual = kernels.merge_(weight, scale, exact=True)
        steps += [weight.clone(), *vars(residual).values()]
        residual = kernels.swap_(weight, scale, other, 0, residual)
        steps += [weight.clone(), *vars(residual).values()]
        kernels.unmerge_(weight, other, 0, residual)
        return [*steps, weight, torch.tensor(weight._version)]

    expected = run(weight)
    with _Seen() as seen:
        found = run(twin)
    assert seen.names == ["ia3::stays_finite", "ia3::merge_exact_", "ia3::swap_exact_", "ia3::unmerge_exact_"]
    assert all(map(torch.equal, found, expected))
