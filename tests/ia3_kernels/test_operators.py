"""Every operator of every backend against the fp64 oracle: dtypes, shapes, strides, adapters, unwritten outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3_kernels as kernels
from ia3_kernels import backends, target
from ia3_kernels.schemas import SCHEMAS

from . import emulated_bindings
from .helpers import (
    ACTIVATIONS,
    DTYPES,
    assert_accurate,
    eager_activation_backward,
    error,
    poison_new_memory,
)

BACKENDS = [status.name for status in backends.report() if status.available]


def _runs() -> list[tuple[str, str]]:
    """(backend, device) of what this machine can run."""
    if target.is_interpreted():
        return [("triton", "cpu")]
    runs = [(name, "cpu") for name in BACKENDS if name not in ("triton", "cuda")]
    if emulated_bindings.AVAILABLE:
        runs += [("cuda", "emulated")]
    if torch.cuda.is_available():
        runs += [(name, "cuda") for name in BACKENDS if name != "native"]
    return runs


@pytest.fixture(params=_runs(), ids=lambda run: run[0] if run[1] == "cpu" else " ".join(run))
def operators(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Callable[..., Any]]]:
    """The operators as one backend runs them; tensors that a test makes are made on its device."""
    name, device = request.param
    found = {op: getattr(torch.ops.ia3, op) for op in SCHEMAS}
    if device == "emulated":
        with emulated_bindings.backend(monkeypatch):
            yield found
        return
    with nullcontext() if device == "cpu" else torch.device(device):
        torch.empty(0)  # torch notes which functions make tensors, before one is replaced
        if name == "triton":
            poison_new_memory(monkeypatch)
        monkeypatch.setenv(target.BACKEND_VARIABLE, name)
        backends.refresh()
        yield found


@pytest.fixture(params=["library", *(name for name in ("triton", "cuda") if name in BACKENDS)])
def matmul(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of a GPU to a product."""
    monkeypatch.setenv(target.GPU_MATMUL_VARIABLE, request.param)


# Odd sizes, single rows and columns, more rows than the small-row kernel takes, more columns than a block; more rows
# than pass by a panel at a time, and fewer panels than threads
LINEAR_SHAPES = [
    (1, 64, 64),
    (1, 5, 1),
    (2, 1, 3),
    (3, 37, 19),
    (5, 1030, 1100),
    (16, 100, 33),
    (17, 100, 33),
    (26, 300, 40),
    (70, 129, 515),
    (530, 70, 20),
]
ACTIVATION_SHAPES = [(1, 1), (1, 5000), (7, 33), (70, 2100), (130, 40)]
if target.is_interpreted():  # a thousand times slower
    LINEAR_SHAPES = [(1, 5, 1), (3, 37, 19), (70, 80, 75)]
    ACTIVATION_SHAPES = [(16, 1), (18, 301)]


def _layouts(rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.randn(rows, 2 * cols + 3).to(dtype)
    return {
        "contiguous": torch.randn(rows, cols).to(dtype),
        "offset half of a joined projection": wide[:, cols : 2 * cols],
        "transposed": torch.randn(cols, rows).to(dtype).t(),
        "every second column": wide[:, : 2 * cols : 2],
    }


@pytest.mark.usefixtures("matmul")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adapters", [0, 3])
def test_scaled_linear(
    request: pytest.FixtureRequest,
    operators: dict[str, Callable[..., Any]],
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    transposed: bool,
    adapters: int,
) -> None:
    rows, inputs, outputs = shape
    if "emulated" in request.node.callspec.id and inputs * outputs > 10**6:
        pytest.skip("a minute in the emulator; test_cuda_emulated has sizes for it")
    x = torch.randn(rows, inputs).to(dtype)
    weight = torch.randn(inputs, outputs).to(dtype).t() if transposed else torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    index = torch.randint(-1, adapters, (rows,), dtype=torch.int32) if adapters else None
    leading = (adapters,) if adapters else ()
    for with_bias in (False, True):
        for input_scale in (None, torch.randn(*leading, inputs)):
            for output_scale in (None, torch.randn(*leading, outputs)):
                if adapters and input_scale is None and output_scale is None:
                    continue
                args = (x, weight, bias if with_bias else None, input_scale, output_scale, index)
                # On a GPU each of two libraries adds up in an order of its own.
                assert_accurate(operators["scaled_linear"], "scaled_linear", *args, terms=inputs if x.is_cuda else 1)


@pytest.mark.usefixtures("matmul")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("indexed", ["input", "output"])
def test_a_vector_beside_a_scale_with_a_row_for_each_adapter(
    operators: dict[str, Callable[..., Any]], dtype: torch.dtype, rows: int, indexed: str
) -> None:
    x, weight, bias = torch.randn(rows, 37).to(dtype), torch.randn(20, 37).to(dtype), torch.randn(20).to(dtype)
    input_scale, output_scale = (
        torch.randn((3, n) if side == indexed else n) for side, n in (("input", 37), ("output", 20))
    )
    index = torch.randint(-1, 3, (rows,), dtype=torch.int32)
    assert_accurate(operators["scaled_linear"], "scaled_linear", x, weight, bias, input_scale, output_scale, index)
    y, product = operators["scaled_linear_product"](x, weight, bias, input_scale, output_scale, index)
    plain = operators["scaled_linear"](x, weight, bias, input_scale, None, index if indexed == "input" else None)
    torch.testing.assert_close(product, plain, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(y, operators["scaled_linear"](x, weight, bias, input_scale, output_scale, index))


@pytest.mark.usefixtures("matmul")
@pytest.mark.parametrize(
    "layout", ["contiguous", "offset half of a joined projection", "transposed", "every second column"]
)
def test_scaled_linear_takes_any_strides(operators: dict[str, Callable[..., Any]], layout: str) -> None:
    for rows in (4, 40):
        x, weight = _layouts(rows, 24, torch.float32)[layout], _layouts(30, 24, torch.float32)[layout]
        assert_accurate(operators["scaled_linear"], "scaled_linear", x, weight, None, torch.randn(24), torch.randn(30))


def _assert_backward_accurate(
    operators: dict[str, Callable[..., Any]],
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    activation: str,
    index: Tensor | None,
) -> None:
    name = "scaled_activation_backward" if up is None else "gated_activation_backward"
    inputs = (dh, gate, scale) if up is None else (dh, gate, up, scale)
    mask = [True] * (len(inputs) - 1)

    def eager(dh: Tensor, gate: Tensor, *others: Any) -> tuple[Tensor, ...]:
        up, scale, *_ = others if name.startswith("gated") else (None, *others)
        gradients = eager_activation_backward(dh, gate, up, scale, activation, index)
        return gradients if scale is not None else (*gradients, gate.new_empty(0))

    assert_accurate(operators[name], name, *inputs, activation, index, mask, eager=eager)


@pytest.mark.usefixtures("matmul")
@pytest.mark.parametrize("rows", [2, 30])
def test_a_batch_of_strided_sequences_keeps_its_shape(operators: dict[str, Callable[..., Any]], rows: int) -> None:
    x = torch.randn(3, rows, 2 * 24)[..., 24:]
    weight, input_scale, output_scale = torch.randn(30, 24), torch.randn(24), torch.randn(30)
    for scales in ((None, None), (input_scale, None), (None, output_scale), (input_scale, output_scale)):
        y = operators["scaled_linear"](x, weight, None, *scales)
        assert y.shape == (3, rows, 30)
        torch.testing.assert_close(y, operators["scaled_linear"](x.contiguous(), weight, None, *scales))
    h = operators["gated_activation"](x, x, input_scale)
    torch.testing.assert_close(h, operators["gated_activation"](x.contiguous(), x.contiguous(), input_scale))
    permuted = torch.randn(rows, 3, 24).transpose(0, 1)  # rows that no single stride describes
    y = operators["scaled_linear"](permuted, weight, None, None, output_scale)
    torch.testing.assert_close(y, operators["scaled_linear"](permuted.contiguous(), weight, None, None, output_scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("shape", ACTIVATION_SHAPES)
@pytest.mark.parametrize("adapters", [0, 3])
def test_activations_and_their_backward(
    operators: dict[str, Callable[..., Any]], dtype: torch.dtype, activation: str, shape: tuple[int, int], adapters: int
) -> None:
    gate, up, dh = ((3 * torch.randn(shape)).to(dtype) for _ in range(3))
    index = torch.randint(-1, adapters, shape[:1], dtype=torch.int32) if adapters else None
    for scale in (torch.randn(adapters, shape[1]) if adapters else torch.randn(shape[1]), None):
        if scale is None and adapters:
            continue
        assert_accurate(operators["gated_activation"], "gated_activation", gate, up, scale, activation, index)
        assert_accurate(operators["scaled_activation"], "scaled_activation", gate, scale, activation, index)
        _assert_backward_accurate(operators, dh, gate, up, scale, activation, index)
        _assert_backward_accurate(operators, dh, gate, None, scale, activation, index)


@pytest.mark.parametrize(
    "layout", ["contiguous", "offset half of a joined projection", "transposed", "every second column"]
)
def test_activations_take_any_strides(operators: dict[str, Callable[..., Any]], layout: str) -> None:
    gate, up, dh = (_layouts(6, 40, torch.bfloat16)[layout] for _ in range(3))
    scale = torch.randn(80)[::2]
    assert_accurate(operators["gated_activation"], "gated_activation", gate, up, scale, "silu")
    _assert_backward_accurate(operators, dh, gate, up, scale, "silu", None)


def _whole_range(dtype: torch.dtype) -> Tensor:
    """All patterns of 16 bits; of 32 bits one in 8191, and all with an empty lower half: NaN and infinities too."""
    if dtype == torch.float32:
        patterns = torch.cat([torch.arange(-(2**31), 2**31, 8191), torch.arange(-(2**31), 2**31, 2**16)])
        x = torch.cat([patterns.to(torch.int32).view(dtype), torch.linspace(-120, 120, 4001)])
    else:
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    if target.is_interpreted():
        ends = [float("nan"), math.inf, -math.inf, torch.finfo(dtype).max, torch.finfo(dtype).min, -1e4, 1e4, 0.0, -0.0]
        x = torch.cat([x[:: len(x) // 500], torch.tensor(ends).to(dtype)])
    return x


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_over_their_whole_range(
    operators: dict[str, Callable[..., Any]], activation: str, dtype: torch.dtype
) -> None:
    """Each value and derivative is within four units in the last place of torch's in fp64, or of 1 where that is more;
    torch's own fp32 functions, which are the reference's, need up to eight. What torch makes NaN may be the limit."""
    x = _whole_range(dtype)
    wide = x.double().requires_grad_()
    exact = ACTIVATIONS[activation](wide)
    (exact_slope,) = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    value = operators["scaled_activation"](x, None, activation)
    slope, _ = operators["scaled_activation_backward"](torch.ones_like(x), x, None, activation, None, [True, False])
    limits = {math.inf: (math.inf, 1.0), -math.inf: (0.0, 0.0)}
    units = 8 if backends.choose("scaled_activation", x.device.type, dtype)[0].name == "reference" else 4
    for side, (result, oracle) in enumerate(((value, exact.detach()), (slope, exact_slope))):
        rounded = oracle.to(dtype)
        close = (result.double() - oracle).abs() <= units * torch.finfo(dtype).eps * oracle.abs().clamp_min(1.0)
        good = close | (result == rounded) | (result.isnan() & oracle.isnan())
        for end, limit in limits.items():
            good |= (x == end) & (result == limit[side])
        if units == 8:  # as torch is in fp32
            like = x.float().requires_grad_()
            other = ACTIVATIONS[activation](like)
            other = (other, *torch.autograd.grad(other, like, torch.ones_like(other)))[side].to(dtype)
            good |= (result == other) | (result.isnan() & other.isnan())
        assert good.all(), (side, x[~good][:8], result[~good][:8], oracle[~good][:8])


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_nan_comes_through(operators: dict[str, Callable[..., Any]], activation: str) -> None:
    x = torch.tensor([[float("nan"), 1.0] * 20])
    assert torch.isnan(operators["scaled_activation"](x, None, activation)[0, ::2]).all()
    assert not torch.isnan(operators["scaled_activation"](x, None, activation)[0, 1::2]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "layout", ["contiguous", "offset half of a joined projection", "transposed", "every second column"]
)
def test_scale_weight_is_one_rounding(
    operators: dict[str, Callable[..., Any]], dtype: torch.dtype, dim: int, layout: str
) -> None:
    weight = _layouts(37, 41, dtype)[layout]
    scale = torch.randn(weight.shape[dim])
    expected = (weight.float() * scale.unsqueeze(1 - dim)).to(dtype)
    storage = weight.data_ptr()
    operators["scale_weight_"](weight, scale, dim)
    assert weight.data_ptr() == storage
    assert torch.equal(weight, expected)


def test_scale_weight_keeps_subnormals_and_specials(operators: dict[str, Callable[..., Any]]) -> None:
    # Every bf16 bit pattern
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    scale = torch.full((256,), 0.7)
    expected = (weight.float() * 0.7).bfloat16()
    if target.is_interpreted():  # its casts from and to bf16 spoil subnormals, which a GPU keeps
        smallest = torch.finfo(torch.bfloat16).smallest_normal
        is_kept = ~((weight.abs() < smallest) | (expected.abs() < smallest)) | (weight == 0)
        weight, expected = torch.where(is_kept, weight, 0), torch.where(is_kept, expected, 0)
    operators["scale_weight_"](weight, scale, 0)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("matmul")
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0,)])
def test_empty_inputs(operators: dict[str, Callable[..., Any]], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    size = shape[-1]
    scale = torch.randn(size)
    assert operators["gated_activation"](x, x, scale).shape == x.shape
    _, _, grad_scale = operators["gated_activation_backward"](x, x, x, scale, "silu", None, [True] * 3)
    assert torch.equal(grad_scale, torch.zeros(size))
    if len(shape) > 1:
        assert operators["scaled_linear"](x, torch.randn(5, size), torch.randn(5), scale).shape == (*shape[:-1], 5)
    assert operators["scaled_linear"](torch.randn(4, size), torch.randn(0, size)).shape == (4, 0)


@pytest.mark.usefixtures("matmul")
def test_no_input_features_leave_the_bias(operators: dict[str, Callable[..., Any]]) -> None:
    bias, scale = torch.randn(3), torch.randn(3)
    y = operators["scaled_linear"](torch.empty(2, 0), torch.empty(3, 0), bias, None, scale)
    torch.testing.assert_close(y, (bias * scale).expand(2, 3))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scales_of_any_floating_dtype(operators: dict[str, Callable[..., Any]], scale_dtype: torch.dtype) -> None:
    x, scale = torch.randn(3, 8).bfloat16(), torch.randn(8).to(scale_dtype)
    expected = (torch.nn.functional.silu(x.float()) * scale.float()).bfloat16()
    assert error(operators["scaled_activation"](x, scale), expected) < 0.01
    _, grad = operators["scaled_activation_backward"](x, x, scale, "silu", None, [True, True])
    assert grad.dtype == scale_dtype


def test_vectors_as_peft_stores_them(operators: dict[str, Callable[..., Any]]) -> None:
    x, up, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8, 8)
    first, second = torch.randn(8), torch.randn(8)
    for shape in ((1, 8), (8, 1)):
        column, other = first.reshape(shape), second.reshape(shape)
        for op, flat, stored in (
            ("scaled_linear", (x, weight, None, first, second), (x, weight, None, column, other)),
            ("gated_activation", (x, up, first), (x, up, column)),
            ("scale_pair", (x, first, second), (x, column, other)),
        ):
            results, expected = operators[op](*stored), operators[op](*flat)
            for result, value in zip(results, expected, strict=True):
                assert torch.equal(result, value)
        *_, grad = operators["gated_activation_backward"](x, x, up, column, "silu", None, [True] * 3)
        assert grad.shape == shape
        *_, flat_grad = operators["gated_activation_backward"](x, x, up, first, "silu", None, [True] * 3)
        assert torch.equal(grad.flatten(), flat_grad)
        *_, grad = operators["scale_pair_backward"](x, up, x, column, other, [True] * 3)
        assert grad.shape == shape


def test_rows_beyond_the_32_bit_range_of_elements() -> None:
    """A gate whose last row begins beyond 2**31 elements: a real stride, over memory that is never touched."""
    rows, stride = 3, 2**30 + 64
    storage = torch.empty(rows * stride, dtype=torch.bfloat16)  # 6 GiB reserved, three rows of it used
    gate = storage.as_strided((rows, 32), (stride, 1))
    gate.copy_(torch.randn(rows, 32))
    dense = gate.clone()
    up = torch.randn(rows, 32).bfloat16()
    assert torch.equal(kernels.gated_activation(gate, up), kernels.gated_activation(dense, up))
    weight = torch.randn(5, 32).bfloat16()
    assert torch.equal(kernels.scaled_linear(gate, weight), kernels.scaled_linear(dense, weight))
