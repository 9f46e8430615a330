"""csrc/cuda without a GPU: the kernels themselves, compiled for the host, against the reference (``emulated``)."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ia3_kernels import ACTIVATIONS, reference

from . import c_interface, emulated
from .c_interface import INVALID, UNSUPPORTED
from .emulated import NAN, Emulated, Failure, between, library, needs_compiler
from .helpers import DTYPES, assert_accurate, error

pytestmark = needs_compiler

# Rows and columns: less than a warp, a block and a half, and beyond; whole vectors and not
SHAPES = [(1, 1), (3, 8), (5, 40), (37, 264), (19, 1032), (70, 33), (2, 257)]


@pytest.fixture(autouse=True)
def _blocks_in_order() -> Iterator[None]:
    library().emulator_set_order(0)
    yield
    library().emulator_set_order(0)


def _index(rows: int, adapters: int) -> Tensor:
    """Adapters -1 to adapters - 2: one is used by no row."""
    return torch.randint(-1, adapters - 1, (rows,), dtype=torch.int32)


def _same_in_any_order(compute: Callable[[], Any]) -> None:
    """Blocks and warps may run in any order, and the bits stay as they are."""
    results: list[list[Tensor]] = []
    for seed in (0, 1, 2):
        library().emulator_set_order(seed)
        result = compute()
        results.append([result] if isinstance(result, Tensor) else list(result))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


# --- scalars -------------------------------------------------------------------------------------------------------


def _activate(activation: str, dtype: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor]:
    value, derivative = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, value, derivative)]
    code = emulated.DTYPES.index(dtype), ACTIVATIONS.index(activation)
    library().emulated_activate(*code, ctypes.c_int64(x.numel()), *pointers)
    return value, derivative


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_as_good_as_torchs(activation: str) -> None:
    # From where silu underflows to where it is x; gelu's tail ends at -14.
    x = torch.cat([torch.linspace(-80, 80, 40001), torch.randn(20000), torch.randn(2000) * 1e-4])
    act, act_backward = reference._ACTIVATIONS[activation]
    value, derivative = _activate(activation, torch.float32, x)
    wide, ones = x.double(), torch.ones_like(x)
    assert error(value, act(wide)) <= max(error(act(x), act(wide)), 2.0**-24)
    oracle = act_backward(ones.double(), wide)
    assert error(derivative, oracle) <= max(error(act_backward(ones, x), oracle), 2.0**-24)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarser_activations_hide_behind_the_rounding(dtype: torch.dtype, activation: str) -> None:
    x = torch.linspace(-12, 12, 30001).to(dtype).float()
    act, act_backward = reference._ACTIVATIONS[activation]
    oracle = act(x.double()), act_backward(torch.ones_like(x).double(), x.double())
    results = _activate(activation, dtype, x)
    # An eighth of half an ulp; of the value also element by element, down to fp16's least normal number
    for result, expected in zip(results, oracle, strict=True):
        assert error(result, expected) <= torch.finfo(dtype).eps / 16
    distance = (results[0].double() - oracle[0]).abs() / oracle[0].abs().clamp_min(2.0**-14)
    assert float(distance.max()) <= torch.finfo(dtype).eps / 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_the_ends(activation: str, dtype: torch.dtype) -> None:
    act, act_backward = reference._ACTIVATIONS[activation]
    x = torch.tensor([0.0, -0.0, -200.0, 200.0, 1e4, -1e4])
    value, derivative = _activate(activation, dtype, x)
    close = {"rtol": max(torch.finfo(dtype).eps / 16, 1e-6), "atol": 1e-20}
    torch.testing.assert_close(value, act(x), **close)
    torch.testing.assert_close(derivative, act_backward(torch.ones_like(x), x), **close)
    value, _ = _activate(activation, dtype, torch.tensor([float("inf"), NAN]))
    assert value[0] == float("inf")
    assert value[1].isnan()


def test_a_compensated_sum_forgets_nothing() -> None:
    terms = torch.cat([torch.tensor([1.0]), torch.full((4096,), 2.0**-25)])
    total = library().emulated_sum(ctypes.c_int64(terms.numel()), ctypes.c_void_p(terms.data_ptr()))
    assert total == 1 + 2.0**-13


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100, 4096, 1 << 20, (1 << 40) + 3])
@pytest.mark.parametrize("strips", [1, 2, 32, 112, 5000])
def test_chunks_fill_a_device_and_no_more(rows: int, strips: int) -> None:
    chunk = library().emulated_rows_per_chunk(ctypes.c_int64(rows), ctypes.c_int64(strips))
    count = -(-rows // chunk)
    assert chunk >= 16
    assert count * strips <= 2048 or count <= 16
    assert chunk == 16 or -(-rows // (chunk // 2)) * strips > 2048


# --- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward(activation: str, dtype: torch.dtype) -> None:
    for (rows, cols), offset in itertools.product(SHAPES, (0, 1)):
        gate, up = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
        kernels = Emulated(offset)
        for scale, index in ((None, None), (torch.randn(cols), None), (torch.randn(3, cols), _index(rows, 3))):
            assert_accurate(kernels.gated_activation, "gated_activation", gate, up, scale, activation, index)
            assert_accurate(kernels.scaled_activation, "scaled_activation", gate, scale, activation, index)


# What the wide paths need on 16 bytes, one at a time: its first row, and the distance between its rows
ONE_THING_OFF = [
    *itertools.product((1,), (0,), ("gate", "up", "out", "grad", "grad_gate", "grad_up", "scale", "weight"))
]
ONE_THING_OFF += [*itertools.product((0,), (1,), ("gate", "up", "out", "grad", "weight"))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "stride_offset", "only"), ONE_THING_OFF)
def test_one_thing_that_is_not_on_16_bytes(offset: int, stride_offset: int, only: str, dtype: torch.dtype) -> None:
    kernels = Emulated(offset, stride_offset, only)
    grad, gate, up, weight = (torch.randn(5, 16).to(dtype) for _ in range(4))
    scale, index = torch.randn(3, 16), _index(5, 3)
    arguments = scale, "silu", index
    assert_accurate(kernels.gated_activation, "gated_activation", gate, up, *arguments)
    backward = kernels.gated_activation_backward
    assert_accurate(backward, "gated_activation_backward", grad, gate, up, *arguments, [True] * 3)
    assert torch.equal(kernels.scaled_weight(weight, scale[0], 1), reference_weight(weight, scale[0], 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_in_place(dtype: torch.dtype) -> None:
    gate, up, scale = torch.randn(21, 48).to(dtype), torch.randn(21, 48).to(dtype), torch.randn(48)
    expected = Emulated().gated_activation(gate, up, scale)
    for target in (0, 1):
        inputs = between(gate, around=emulated.UNTOUCHED), between(up, around=emulated.UNTOUCHED)
        out = inputs[target]
        emulated.call("activation", emulated.activation_args(*inputs, scale, "silu", None, out))
        assert torch.equal(out, expected)
        assert emulated.intact(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward(activation: str, dtype: torch.dtype) -> None:
    # 264 columns are two strips; 37 rows are three chunks.
    for (rows, cols), offset in itertools.product(((1, 1), (5, 40), (37, 264), (70, 33)), (0, 1)):
        grad, gate, up = (torch.randn(rows, cols).to(dtype) for _ in range(3))
        kernels = Emulated(offset)
        for scale, index in ((torch.randn(cols), None), (torch.randn(4, cols), _index(rows, 4)), (None, None)):
            arguments = scale, activation, index
            everything = [True, True, scale is not None]
            gated, plain = kernels.gated_activation_backward, kernels.scaled_activation_backward
            assert_accurate(gated, "gated_activation_backward", grad, gate, up, *arguments, everything)
            assert_accurate(plain, "scaled_activation_backward", grad, gate, *arguments, everything[1:])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_backward_computes_what_is_wanted(wanted: tuple[bool, bool, bool]) -> None:
    grad, gate, up, scale = torch.randn(40, 16), torch.randn(40, 16), torch.randn(40, 16), torch.randn(16)
    for activation in ("silu", "identity"):
        arguments = scale, activation, None
        gated, plain = Emulated().gated_activation_backward, Emulated().scaled_activation_backward
        assert_accurate(gated, "gated_activation_backward", grad, gate, up, *arguments, list(wanted))
        assert_accurate(plain, "scaled_activation_backward", grad, gate, *arguments, list(wanted[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_sum_is_as_good_as_torchs(dtype: torch.dtype) -> None:
    # Terms of one sign, which a plain running sum in fp32 loses digits of
    rows = 20000
    grad, x = torch.rand(rows, 8).to(dtype) + 1, torch.rand(rows, 8).to(dtype) + 1
    _, ds = Emulated().scaled_activation_backward(grad, x, torch.ones(8), "identity", None, (False, True))
    oracle = (grad.double() * x.double()).sum(0)
    assert error(ds, oracle) <= max(error((grad.float() * x.float()).sum(0), oracle), 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_adapters(dtype: torch.dtype) -> None:
    rows, cols, adapters = 90, 24, 60  # most chunks hold a row or two, and many adapters none
    grad, gate, up = (torch.randn(rows, cols).to(dtype) for _ in range(3))
    index = torch.randint(-1, adapters, (rows,), dtype=torch.int32)
    index[::2] = 7  # with many chunks
    arguments = grad, gate, up, torch.randn(adapters, cols), "silu", index, [True, True, True]
    assert_accurate(Emulated().gated_activation_backward, "gated_activation_backward", *arguments)
    _same_in_any_order(lambda: Emulated().gated_activation_backward(*arguments))


@pytest.mark.parametrize("offset", [0, 1])
def test_a_wrong_index_makes_its_rows_nan_and_no_others(offset: int) -> None:
    kernels = Emulated(offset)
    x, scale = torch.randn(7, 16), torch.randn(2, 16)
    index = torch.tensor([0, 2, -1, -2, 1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    wrong = torch.tensor([False, True, False, True, False, True, True])
    good = index.masked_fill(wrong, 0)
    results = {
        "forward": lambda i: kernels.scaled_activation(x, scale, "silu", i),
        "backward": lambda i: kernels.scaled_activation_backward(x, x, scale, "silu", i, (True, True))[0],
    }
    for name, compute in results.items():
        result, expected = compute(index), compute(good)
        assert bool(result[wrong].isnan().all()), name
        assert torch.equal(result[~wrong], expected[~wrong]), name


def test_the_order_of_blocks_changes_no_bit() -> None:
    grad, gate, up = (torch.randn(70, 264).bfloat16() for _ in range(3))
    scale, scales, index = torch.randn(264), torch.randn(3, 264), _index(70, 3)
    _same_in_any_order(lambda: Emulated().gated_activation(gate, up, scale))
    for s, i in ((scale, None), (scales, index)):
        _same_in_any_order(
            lambda s=s, i=i: Emulated().gated_activation_backward(grad, gate, up, s, "silu", i, [True] * 3)
        )


def test_more_rows_than_a_grid_has_blocks() -> None:
    # 65535 blocks of 8 rows, 4 at once a thread: a block goes on to rows beyond them.
    rows = 65535 * 32 + 5
    x = torch.randn(rows, 1).half()
    out = torch.full_like(x, NAN)
    emulated.call("activation", emulated.activation_args(x, None, None, "relu", None, out))
    assert torch.equal(out, x.relu())


def test_more_blocks_than_a_grid_has() -> None:
    x, scale, numbers = torch.randn(1, 33), torch.randn(1, 33), torch.zeros(1, dtype=torch.int32)
    args = c_interface.BackwardArgs(0, 0, 1, 33, x.data_ptr(), 33, x.data_ptr(), 33)
    args.scale = c_interface.Scale(scale.data_ptr(), None, 1)
    args.chunks = ctypes.pointer(c_interface.Chunks(*[numbers.data_ptr()] * 6, 1 << 30))
    with pytest.raises(Failure, match="1073741824 chunks of 33 columns") as failure:
        emulated.call("activation_backward", args)
    assert failure.value.status == UNSUPPORTED


def test_offsets_beyond_32_bits() -> None:
    stride = (1 << 31) + 8  # 4 GiB of 16-bit elements between two rows; nothing touches what lies between
    memory = torch.empty(stride + 8, dtype=torch.bfloat16)
    x = memory.as_strided((2, 8), (stride, 1))
    x.copy_(torch.randn(2, 8))
    expected = reference.scaled_activation(x.contiguous())
    emulated.call("activation", emulated.activation_args(x, None, None, "silu", None, x))
    assert_close_bits(x.contiguous(), expected)
    scale = torch.randn(8)
    weight = reference_weight(x.contiguous(), scale, 1)
    args = c_interface.ScaleWeightArgs(1, 2, 8, x.data_ptr(), stride, None, scale.data_ptr())
    emulated.call("scale_weight", args)
    assert torch.equal(x.contiguous(), weight)


def assert_close_bits(result: Tensor, expected: Tensor) -> None:
    """The same to the last bit of the dtype, but for one where fp32 values lie close to the middle."""
    torch.testing.assert_close(result, expected, rtol=torch.finfo(result.dtype).eps, atol=0)


# --- one input for two layers --------------------------------------------------------------------------------------


def _pair(rows: int, cols: int, dtype: torch.dtype) -> list[Tensor]:
    """What the backward of scale_pair takes: two gradients, the input, two scales."""
    return [*(torch.randn(rows, cols).to(dtype) for _ in range(3)), torch.randn(cols), torch.randn(cols)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_pair(dtype: torch.dtype) -> None:
    for (rows, cols), offset in itertools.product(SHAPES, (0, 1)):
        *_, x, first, second = _pair(rows, cols, dtype)
        results, expected = Emulated(offset).scale_pair(x, first, second), reference.scale_pair(x, first, second)
        # One product and one rounding: there is only one right result.
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_pair_backward(dtype: torch.dtype) -> None:
    for shape, offset in itertools.product(SHAPES, (0, 1)):
        arguments = *_pair(*shape, dtype), [True] * 3
        assert_accurate(Emulated(offset).scale_pair_backward, "scale_pair_backward", *arguments)


PAIR = ("x", "first", "second", "a", "b", "grad_first", "grad_second", "grad_x")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("offset", "stride_offset", "only"),
    [*((1, 0, name) for name in PAIR), *((0, 1, name) for name in ("x", "grad_first", "grad_second"))],
)
def test_one_thing_of_a_pair_that_is_not_on_16_bytes(
    offset: int, stride_offset: int, only: str, dtype: torch.dtype
) -> None:
    kernels = Emulated(offset, stride_offset, only)
    arguments = _pair(35, 16, dtype)
    assert_accurate(kernels.scale_pair, "scale_pair", *arguments[2:])
    assert_accurate(kernels.scale_pair_backward, "scale_pair_backward", *arguments, [True] * 3)


@pytest.mark.parametrize("rows", [5, 70])  # one chunk, and several
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_scale_pair_backward_computes_what_is_wanted(wanted: tuple[bool, bool, bool], rows: int) -> None:
    for dtype, cols in itertools.product(DTYPES, (16, 33)):
        arguments = _pair(rows, cols, dtype)
        whole = Emulated().scale_pair_backward(*arguments, [True] * 3)
        before = library().emulator_launches()
        results = Emulated().scale_pair_backward(*arguments, wanted)
        assert library().emulator_launches() == before + any(wanted)
        for result, other, is_wanted in zip(results, whole, wanted, strict=True):
            assert torch.equal(result, other) if is_wanted else not result.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_of_a_pair_are_as_good_as_torchs(dtype: torch.dtype) -> None:
    da, db, x = (torch.rand(20000, 8).to(dtype) + 1 for _ in range(3))
    _, *sums = Emulated().scale_pair_backward(da, db, x, torch.ones(8), torch.ones(8), (False, True, True))
    for result, grad in zip(sums, (da, db), strict=True):
        oracle = (grad.double() * x.double()).sum(0)
        assert error(result, oracle) <= max(error((grad.float() * x.float()).sum(0), oracle), 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_blocks_changes_no_bit_of_a_pair(dtype: torch.dtype) -> None:
    arguments = _pair(70, 264, dtype)
    _same_in_any_order(lambda: Emulated().scale_pair(*arguments[2:]))
    _same_in_any_order(lambda: Emulated().scale_pair_backward(*arguments, [True] * 3))


def test_a_pair_of_more_rows_than_a_grid_has_blocks() -> None:
    rows = 65535 * 32 + 5
    x, first, second = torch.randn(rows, 1).half(), torch.tensor([2.0]), torch.tensor([-0.5])
    results = torch.full_like(x, NAN), torch.full_like(x, NAN)
    args = c_interface.ScalePairArgs(2, rows, 1, x.data_ptr(), 1)
    args.scales[:], args.out[:] = (first.data_ptr(), second.data_ptr()), [result.data_ptr() for result in results]
    emulated.call("scale_pair", args)
    assert torch.equal(results[0], x * 2)
    assert torch.equal(results[1], x * -0.5)


def test_rows_of_a_pair_beyond_32_bits() -> None:
    stride = (1 << 31) + 8
    da, db, x, first, second = _pair(2, 8, torch.bfloat16)
    memory = torch.empty(stride + 8, dtype=torch.bfloat16)
    far = memory.as_strided((2, 8), (stride, 1))
    scales = first.data_ptr(), second.data_ptr()

    def results() -> list[Tensor]:
        return [torch.full_like(x, NAN), torch.full_like(x, NAN)]

    forward = results()
    args = c_interface.ScalePairArgs(1, 2, 8, far.copy_(x).data_ptr(), stride)
    args.scales[:], args.out[:] = scales, [result.data_ptr() for result in forward]
    emulated.call("scale_pair", args)
    assert all(map(torch.equal, forward, reference.scale_pair(x, first, second)))
    expected = Emulated().scale_pair_backward(da, db, x, first, second, [True] * 3)
    for which, tensor in enumerate((da, db, x)):
        matrices = [(other.data_ptr(), 8) for other in (da, db, x)]
        matrices[which] = (far.copy_(tensor).data_ptr(), stride)
        backward = torch.full_like(x, NAN), torch.empty(8), torch.empty(8)
        args = c_interface.ScalePairBackwardArgs(1, 2, 8)
        args.grads[:], args.grad_strides[:] = zip(*matrices[:2], strict=True)
        args.x, args.x_stride = matrices[2]
        args.scales[:], args.grad_x = scales, backward[0].data_ptr()
        args.grad_scales[:] = [sums.data_ptr() for sums in backward[1:]]
        emulated.call("scale_pair_backward", args)
        assert all(map(torch.equal, backward, expected))


# --- weights -------------------------------------------------------------------------------------------------------


def reference_weight(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
    result = weight.clone()
    reference.scale_weight_(result, scale, dim)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_scale_weight(dim: int, dtype: torch.dtype) -> None:
    for (rows, cols), offset in itertools.product(SHAPES, (0, 1)):
        weight, scale = torch.randn(rows, cols).to(dtype), torch.randn((rows, cols)[dim])
        # One product and one rounding: there is only one right result.
        assert torch.equal(Emulated(offset).scaled_weight(weight, scale, dim), reference_weight(weight, scale, dim))


def test_scaled_weights_round_like_torch_at_the_ends() -> None:
    for dtype in DTYPES:
        tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        weight = torch.tensor([[tiny, tiny / 4, huge, -huge, 1.0, float("inf"), NAN, -0.0]]).to(dtype)
        for factor in (1.0, 0.5, 0.7, 1.5, -1.0):
            scale = torch.full((8,), factor)
            result, expected = Emulated().scaled_weight(weight, scale, 1), reference_weight(weight, scale, 1)
            assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0))
            assert torch.equal(result.isnan(), expected.isnan())


# --- bad input -----------------------------------------------------------------------------------------------------


def test_nothing_is_launched_for_nothing() -> None:
    kernels, before = Emulated(), library().emulator_launches()
    for rows, cols in ((0, 5), (5, 0), (0, 0)):
        x, scale = torch.empty(rows, cols), torch.randn(cols)
        assert kernels.gated_activation(x, x, scale).shape == (rows, cols)
        dx, ds = kernels.scaled_activation_backward(x, x, scale, "silu", None, (True, True))
        assert dx.shape == (rows, cols)
        assert torch.equal(ds, torch.zeros(cols))
        assert kernels.scale_pair(x, scale, scale)[1].shape == (rows, cols)
        for ds in kernels.scale_pair_backward(x, x, x, scale, scale, [True] * 3)[1:]:
            assert torch.equal(ds, torch.zeros(cols))
        assert kernels.scaled_weight(x, scale, 1).shape == (rows, cols)
    assert library().emulator_launches() == before


def _good_arguments() -> dict[str, tuple[ctypes.Structure, list[Tensor]]]:
    """Arguments that each function takes, with the tensors that they point to."""
    x, out, scale = torch.randn(4, 8), torch.full((4, 8), NAN), torch.randn(8)
    activation = emulated.activation_args(x, x, scale, "silu", None, out)
    backward = c_interface.BackwardArgs(0, 0, 4, 8, x.data_ptr(), 8, x.data_ptr(), 8, x.data_ptr(), 8)
    backward.grad_gate = backward.grad_up = out.data_ptr()
    pair = c_interface.ScalePairArgs(0, 4, 8, x.data_ptr(), 8)
    pair.scales[:], pair.out[:] = [scale.data_ptr()] * 2, [out.data_ptr()] * 2
    pair_backward = c_interface.ScalePairBackwardArgs(0, 4, 8)
    pair_backward.grads[:], pair_backward.grad_strides[:] = [x.data_ptr()] * 2, [8] * 2
    pair_backward.x, pair_backward.x_stride = x.data_ptr(), 8
    sums = torch.empty(8)
    pair_backward.scales[:], pair_backward.grad_scales[:] = [scale.data_ptr()] * 2, [sums.data_ptr()] * 2
    pair_backward.grad_x = out.data_ptr()
    weight = c_interface.ScaleWeightArgs(0, 4, 8, out.data_ptr(), 8, None, scale.data_ptr())
    parity, counts = torch.zeros(4, dtype=torch.uint8), torch.zeros(8, dtype=torch.int16)
    exact = c_interface.ExactScaleArgs(0, c_interface.MOVE, 4, 8, out.data_ptr(), 8, None, scale.data_ptr(), 0, 4)
    exact.parity, exact.workspace = parity.data_ptr(), counts.data_ptr()
    keep = [x, out, scale, sums, parity, counts]
    return {
        "activation": (activation, keep),
        "activation_backward": (backward, keep),
        "scale_pair": (pair, keep),
        "scale_pair_backward": (pair_backward, keep),
        "scale_weight": (weight, keep),
        "exact_scale": (exact, keep),
    }


# function, field (.0 and .1 for those of a pair), value, what the sentence says
BAD = [
    ("activation", "dtype", 3, "dtype is 3"),
    ("activation", "dtype", -1, "dtype is -1"),
    ("activation", "activation", 6, "activation is 6"),
    ("activation", "rows", -1, "-1 x 8"),
    ("activation", "cols", -8, "4 x -8"),
    ("activation", "gate", None, "gate is null"),
    ("activation", "out", None, "out is null"),
    ("activation", "gate_stride", -8, "gate has rows of 8 elements, -8 apart"),
    ("activation", "up_stride", -8, "up has rows of 8 elements, -8 apart"),
    ("activation", "out_stride", 7, "out has rows of 8 elements, 7 apart"),
    ("activation", "scale.index", 64, "scale has an index and 0 adapters"),
    ("activation_backward", "dtype", 3, "dtype is 3"),
    ("activation_backward", "activation", -1, "activation is -1"),
    ("activation_backward", "rows", -4, "-4 x 8"),
    ("activation_backward", "grad", None, "grad is null"),
    ("activation_backward", "gate", None, "gate is null"),
    ("activation_backward", "up", None, "grad_up is given and up is null"),
    ("activation_backward", "chunks", c_interface.Chunks(), "0 chunks and 0 adapters"),
    ("scale_pair", "dtype", 3, "dtype is 3"),
    ("scale_pair", "rows", -1, "-1 x 8"),
    ("scale_pair", "cols", -8, "4 x -8"),
    ("scale_pair", "x", None, "x is null"),
    ("scale_pair", "x_stride", -8, "x has rows of 8 elements, -8 apart"),
    ("scale_pair", "scales.0", None, r"scales\[0\] is null"),
    ("scale_pair", "scales.1", None, r"scales\[1\] is null"),
    ("scale_pair", "out.0", None, r"out\[0\] is null"),
    ("scale_pair", "out.1", None, r"out\[1\] is null"),
    ("scale_pair_backward", "dtype", -1, "dtype is -1"),
    ("scale_pair_backward", "rows", -4, "-4 x 8"),
    ("scale_pair_backward", "x", None, "x is null"),
    ("scale_pair_backward", "x_stride", -8, "x has rows of 8 elements, -8 apart"),
    ("scale_pair_backward", "grads.0", None, r"grads\[0\] is null"),
    ("scale_pair_backward", "grads.1", None, r"grads\[1\] is null"),
    ("scale_pair_backward", "grad_strides.1", -8, r"grads\[1\] has rows of 8 elements, -8 apart"),
    ("scale_pair_backward", "scales.0", None, r"scales\[0\] is null"),
    ("scale_pair_backward", "scales.1", None, r"scales\[1\] is null"),
    ("scale_weight", "dtype", 7, "dtype is 7"),
    ("scale_weight", "rows", -1, "-1 x 8"),
    ("scale_weight", "weight", None, "weight is null"),
    ("scale_weight", "weight_stride", 4, "weight has rows of 8 elements, 4 apart"),
    ("scale_weight", "col_scale", None, "both null"),
    ("scale_weight", "row_scale", 64, "both given"),
    ("exact_scale", "dtype", 3, "dtype is 3"),
    ("exact_scale", "mode", 4, "mode is 4"),
    ("exact_scale", "rows", -1, "-1 x 8"),
    ("exact_scale", "weight", None, "weight is null"),
    ("exact_scale", "weight_stride", 7, "weight has rows of 8 elements, 7 apart"),
    ("exact_scale", "new_scale", None, "old_scale and new_scale are both null"),
    ("exact_scale", "rows_per_group", 3, "rows_per_group is 3; expected a divisor of the 4 rows"),
    ("exact_scale", "parity", None, "parity is null"),
    ("exact_scale", "workspace", None, "workspace is null"),
    ("exact_scale", "escapes", 1, "positions is null"),
    ("exact_scale", "mode", c_interface.COLLECT, "offsets is null"),
]


@pytest.mark.parametrize(("function", "field", "value", "sentence"), BAD)
def test_bad_arguments(function: str, field: str, value: Any, sentence: str) -> None:
    args, keep = _good_arguments()[function]
    before = library().emulator_launches()
    if field == "scale.index":
        args.scale.index = value
    elif field[-2:-1] == ".":
        getattr(args, field[:-2])[int(field[-1])] = value
    elif isinstance(value, c_interface.Chunks):
        args.chunks = ctypes.pointer(value)
    else:
        setattr(args, field, value)
    with pytest.raises(Failure, match=sentence) as failure:
        emulated.call(function, args)
    assert failure.value.status == INVALID
    assert str(failure.value).endswith(".")
    assert "expected" in str(failure.value)
    assert library().emulator_launches() == before
    assert bool(keep[1].isnan().all())


@pytest.mark.parametrize("function", list(_good_arguments()))
def test_a_refused_launch_is_told(function: str) -> None:
    args, keep = _good_arguments()[function]
    library().emulator_fail_next_launch()
    with pytest.raises(Failure, match="cudaErrorLaunchFailure") as failure:
        emulated.call(function, args)
    assert failure.value.status == c_interface.CUDA_ERROR
    emulated.call(function, args)
    assert not bool(keep[1].isnan().all()) or function in ("scale_weight", "exact_scale")


def test_a_missing_workspace_is_told() -> None:
    x, ds = torch.randn(40, 8), torch.empty(8)
    args = c_interface.BackwardArgs(0, 0, 40, 8, x.data_ptr(), 8, x.data_ptr(), 8)
    args.grad_scale = ds.data_ptr()
    assert library().ia3_cuda_activation_backward_workspace(ctypes.byref(args)) > 0
    pair = c_interface.ScalePairBackwardArgs(0, 40, 8)
    pair.grads[0], pair.grad_strides[0], pair.x, pair.x_stride = x.data_ptr(), 8, x.data_ptr(), 8
    pair.grad_scales[0] = ds.data_ptr()
    assert library().ia3_cuda_scale_pair_backward_workspace(ctypes.byref(pair)) > 0
    for workspace in (None, x.data_ptr() + 4):
        args.workspace = pair.workspace = workspace
        for function, arguments in (("activation_backward", args), ("scale_pair_backward", pair)):
            with pytest.raises(Failure, match=r"workspace is .* on a multiple of 16"):
                emulated.call(function, arguments)
