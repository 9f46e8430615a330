"""Triton's kernels without a GPU, in Triton's interpreter: launches, adapters, chunks, bounds, 64-bit offsets.

``make test`` runs this in a process of its own, with TRITON_INTERPRET=1, together with the tests of every backend that
take part there. The interpreter checks each address (``interpreter.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3_kernels as kernels
from ia3_kernels import matmul, reference
from ia3_kernels.backends.triton import BACKEND
from ia3_kernels.chunks import chunks_by_adapter
from ia3_kernels.launches import ActivationLaunch, Architecture, LinearLaunch
from ia3_kernels.triton import activation, linear, scale_pair, weight

from .helpers import DTYPES, assert_accurate, error, poison_new_memory

OPERATORS: Any = BACKEND.operators

# One multiprocessor: a program walks over several tiles.
SMALL = Architecture("cuda", 80, 1)
NAN = float("nan")


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "place" not in request.fixturenames:  # whole models allocate through what tracing and autograd see
        poison_new_memory(monkeypatch)


def _surrounded(tensor: Tensor) -> Tensor:
    """The same values as a view with NaN on all sides, rows and columns."""
    rows, cols = tensor.shape
    memory = tensor.new_full((rows + 2, cols + 16), NAN)
    memory[1:-1, 8:-8] = tensor
    return memory[1:-1, 8:-8]


def _between(tensor: Tensor) -> Tensor:
    """The same values, contiguous, with NaN before and after."""
    memory = tensor.new_full((tensor.numel() + 128,), NAN)
    memory[64:-64] = tensor.flatten()
    return memory[64:-64].view(tensor.shape)


def _linear(launch: LinearLaunch) -> Callable[..., Tensor]:
    return lambda *args: linear.matmul(*args, architecture=SMALL, launch=launch)


# --- launches of the matmul --------------------------------------------------------------------------------------

LAUNCHES = {
    "one tile": LinearLaunch(64, 64, 64, 1, 8, False, 8, 2),
    "uneven tiles": LinearLaunch(16, 16, 16, 1, 8, False, 8, 2),
    "groups of 2 rows of tiles": LinearLaunch(16, 16, 32, 1, 2, False, 8, 2),
    "groups of 1": LinearLaunch(16, 32, 32, 1, 1, False, 4, 2),
    "K in 2": LinearLaunch(32, 32, 16, 2, 8, False, 8, 2),
    "K in 3": LinearLaunch(16, 32, 16, 3, 2, False, 8, 2),
    "K in 4, the last part beyond it": LinearLaunch(32, 32, 16, 4, 8, False, 8, 2),
    "descriptors": LinearLaunch(16, 32, 32, 1, 2, True, 8, 2),
    "descriptors, K in 3": LinearLaunch(32, 16, 16, 3, 8, True, 8, 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_launch_computes_the_same(launch: str, transposed: bool, dtype: torch.dtype) -> None:
    # 40 inputs are 3 steps of 16; 24 outputs and 19 rows fill no tile. Rows of a multiple of 16 bytes, for descriptors.
    rows, inputs, outputs = 19, 40, 24
    x = _surrounded(torch.randn(rows, inputs).to(dtype))
    matrix = _surrounded((torch.randn(inputs, outputs) if transposed else torch.randn(outputs, inputs)).to(dtype))
    w = matrix.t() if transposed else matrix
    bias = _between(torch.randn(outputs).to(dtype))
    index = torch.randint(-1, 3, (rows,), dtype=torch.int32)
    operator = _linear(LAUNCHES[launch])
    for scales in (
        (None, None, None),
        (None, torch.randn(outputs), None),
        (torch.randn(inputs), torch.zeros(outputs), None),
        (_between(torch.randn(3, inputs)), _between(torch.randn(3, outputs)), index),
    ):
        assert_accurate(operator, "scaled_linear", x, w, bias, *scales)
    assert_accurate(operator, "scaled_linear", x, w, None, None, torch.randn(outputs))


def test_the_smaller_of_two_scales_bounds_the_index() -> None:
    """As on a GPU, where nobody has looked at the index: what lies behind the scale is not read."""
    whole = torch.full((8, 24), 77.0)
    index = torch.tensor([-1, 2, 3, 4], dtype=torch.int32)
    x, w = torch.randn(4, 16), torch.randn(24, 16)
    y = _linear(LAUNCHES["uneven tiles"])(x, w, None, torch.ones(5, 16), whole[:3].fill_(1), index)
    torch.testing.assert_close(y[:2], x[:2] @ w.t())
    assert y[2:].isnan().all()


@pytest.mark.parametrize("launch", ["uneven tiles", "K in 4, the last part beyond it"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 3), (33, 1, 2), (2, 15, 17)])
def test_launches_of_tiles_larger_than_the_matrices(launch: str, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    x, w = _surrounded(torch.randn(rows, inputs)), _surrounded(torch.randn(outputs, inputs))
    operator = _linear(LAUNCHES[launch])
    assert_accurate(operator, "scaled_linear", x, w, torch.randn(outputs), torch.randn(inputs), torch.randn(outputs))


@pytest.mark.parametrize(("rows", "tiles_n", "group"), list(itertools.product((1, 2, 5, 7), (1, 3), (1, 2, 4, 8))))
def test_every_tile_is_visited_once(rows: int, tiles_n: int, group: int) -> None:
    launch = LinearLaunch(16, 16, 16, 1, group, False, 8, 2)
    x, w = torch.randn(16 * rows, 16), torch.randn(16 * tiles_n, 16)
    # An unvisited tile keeps NaN.
    torch.testing.assert_close(_linear(launch)(x, w), x @ w.t(), rtol=1e-5, atol=1e-5)


def test_a_measured_launch_with_descriptors_runs_where_addresses_do_not_allow_them() -> None:
    x, w = torch.randn(8, 65)[:, 1:], torch.randn(16, 65)[:, 1:]
    assert_accurate(_linear(LAUNCHES["descriptors"]), "scaled_linear", x, w, None, None, torch.randn(16))


# --- behind the library's product --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_epilogue_behind_the_library_is_in_place(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, bias = (torch.randn(shape).to(dtype) for shape in ((2, 5, 12), (7, 12), (7,)))
    vectors, index = torch.randn(3, 7), torch.randint(-1, 3, (2, 5), dtype=torch.int32)
    products: list[Tensor] = []
    plain = torch.nn.functional.linear

    def recorded(*args: Any) -> Tensor:
        products.append(plain(*args))
        return products[-1]

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    before = [tensor.clone() for tensor in (x, w, bias)]
    result = matmul.library(x, w, bias, None, vectors, index)
    assert len(products) == 1
    assert result is products[0]
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, w, bias), strict=True))
    assert_accurate(lambda *_: result, "scaled_linear", x, w, bias, None, vectors, index)


def test_an_activation_may_write_over_its_input() -> None:
    x, scale = torch.randn(9, 20), torch.randn(20)
    expected = activation.forward(x, None, scale, "silu", None)
    assert activation.forward(x, None, scale, "silu", None, out=x) is x
    assert torch.equal(x, expected)


# --- adapters ----------------------------------------------------------------------------------------------------


def _chunks_in_python(index: list[int], adapters: int, chunk: int) -> list[tuple[int, list[int]]]:
    """(adapter, rows) of every chunk: adapters in order, then -1, then unknown ones, which count as -2."""

    def group(adapter: int) -> int:
        return adapter if 0 <= adapter < adapters else -1 if adapter == -1 else -2

    chunks = []
    for adapter in (*range(adapters), -1, -2):
        rows = [row for row, of_row in enumerate(index) if group(of_row) == adapter]
        chunks += [(adapter, rows[i : i + chunk]) for i in range(0, len(rows), chunk)]
    return chunks


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize(
    ("index", "adapters"),
    [
        ([0], 1),
        ([-1], 3),
        ([5], 3),
        ([2, 2, 2, 2, 2], 3),
        ([-1] * 9, 2),
        ([1, -1, 0, 3, 1, 1, -7, 0, 1, -1, 1, 1], 3),
        ([0, 1] * 17 + [2**31 - 1, -(2**31)], 2),
        ([4, 3, 2, 1, 0], 5),
    ],
)
def test_chunks_are_those_of_a_plain_loop(index: list[int], adapters: int, chunk: int) -> None:
    table = chunks_by_adapter(torch.tensor(index, dtype=torch.int32), adapters, chunk)
    order = table.order.tolist()
    filled = [
        (adapter, order[first:last])
        for first, last, adapter in zip(table.first.tolist(), table.last.tolist(), table.adapter.tolist(), strict=True)
        if first < last
    ]
    expected = _chunks_in_python(index, adapters, chunk)
    assert filled == expected
    ranges = zip(table.adapter_first.tolist(), table.adapter_last.tolist(), strict=True)
    for adapter, (first, last) in zip(range(adapters), ranges, strict=False):
        assert expected[first:last] == [entry for entry in expected if entry[0] == adapter]


@pytest.mark.parametrize("wrong", [3, -2, 2**31 - 1, -(2**31)])
def test_an_unknown_adapter_gives_nan_in_its_rows_and_reads_nothing(wrong: int) -> None:
    index = torch.tensor([0, wrong, -1, 2, wrong, 2, 1], dtype=torch.int32)
    known = index != wrong
    gate, up, dh, x = (_surrounded(torch.randn(7, 40)) for _ in range(4))
    w = _surrounded(torch.randn(24, 40))
    inner, outer = _between(torch.randn(3, 40)), _between(torch.randn(3, 24))

    def kept(tensor: Tensor) -> Tensor:
        assert torch.isnan(tensor[~known]).all()
        return tensor[known]

    for launch in (LAUNCHES["uneven tiles"], LAUNCHES["K in 2"]):
        for scales in ((inner, None), (None, outer), (inner, outer)):
            y = kept(_linear(launch)(x, w, None, *scales, index))
            expected = reference.scaled_linear(x[known], w, None, *scales, index[known])
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        kept(OPERATORS["gated_activation"](gate, up, inner, "silu", index)),
        reference.gated_activation(gate[known], up[known], inner, "silu", index[known]),
    )
    grads = OPERATORS["gated_activation_backward"](dh, gate, up, inner, "silu", index, [True] * 3)
    rows = (dh[known], gate[known], up[known])
    expected = reference.gated_activation_backward(*rows, inner, "silu", index[known], [True] * 3)
    # The adapters' own gradients know nothing of those rows.
    results = (kept(grads[0]), kept(grads[1]), grads[2])
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [[-1] * 6, [1] * 6, [2, 0, 2, 0, 2, 0], [0]])
def test_an_adapter_without_rows_has_a_zero_gradient(index: list[int]) -> None:
    adapter_index = torch.tensor(index, dtype=torch.int32)
    dh, gate, up = (torch.randn(len(index), 20) for _ in range(3))
    scale = torch.randn(3, 20)
    *_, grad = OPERATORS["gated_activation_backward"](dh, gate, up, scale, "gelu", adapter_index, [False, False, True])
    *_, expected = reference.gated_activation_backward(dh, gate, up, scale, "gelu", adapter_index, [False, False, True])
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    for adapter in set(range(3)) - set(index):
        assert torch.equal(grad[adapter], torch.zeros(20))


# --- launches of the activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", [(1, 8, 1), (4, 16, 4), (2, 16, 8), (16, 64, 16)])
@pytest.mark.parametrize("adapters", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_in_every_tile(launch: tuple[int, int, int], adapters: int, dtype: torch.dtype) -> None:
    tiles = ActivationLaunch(*launch, num_warps=4)
    dh, gate, up = (_surrounded(torch.randn(13, 21).to(dtype)) for _ in range(3))
    scale = _between(torch.randn(2, 21)) if adapters else _between(torch.randn(21))
    index = torch.randint(-1, 2, (13,), dtype=torch.int32) if adapters else None

    def gated(*args: Any) -> Tensor:
        return activation.forward(*args, launch=tiles)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        return activation.backward(*args, launch=tiles)

    assert_accurate(gated, "gated_activation", gate, up, scale, "silu", index)
    assert_accurate(backward, "gated_activation_backward", dh, gate, up, scale, "silu", index, [True] * 3)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("adapters", [0, 2])
def test_backward_gives_what_is_wanted_and_no_more(wanted: tuple[bool, bool, bool], adapters: int) -> None:
    dh, gate, up = (torch.randn(5, 12) for _ in range(3))
    scale = torch.randn(2, 12) if adapters else torch.randn(12)
    index = torch.tensor([0, -1, 1, 1, 0], dtype=torch.int32) if adapters else None
    args = (dh, gate, up, scale, "gelu_tanh", index)
    whole = OPERATORS["gated_activation_backward"](*args, [True] * 3)
    for result, other, is_wanted in zip(
        OPERATORS["gated_activation_backward"](*args, wanted), whole, wanted, strict=True
    ):
        assert torch.equal(result, other) if is_wanted else not result.numel()


@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_derivatives_far_out_are_exact_to_a_few_roundings(name: str) -> None:
    """Element by element, where 1 - σ(x) would cancel: within a few units in the last place of the largest term."""
    x = torch.cat([torch.linspace(-90, 90, 3001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    ones = torch.ones_like(x)
    slope, _ = OPERATORS["scaled_activation_backward"](ones, x, None, name, None, [True, False])
    exact, _ = reference.scaled_activation_backward(ones.double(), x.double(), None, name, None, [True, False])
    assert torch.all((slope.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs().clamp_min(1.0))


# --- one input for two layers ------------------------------------------------------------------------------------


def _pair(rows: int, cols: int, dtype: torch.dtype) -> list[Tensor]:
    """What the backward of scale_pair takes: two gradients, the input, two scales."""
    matrices = [_surrounded(torch.randn(rows, cols).to(dtype)) for _ in range(3)]
    return [*matrices, _between(torch.randn(cols)), _between(torch.randn(cols))]


@pytest.mark.parametrize("launch", [None, (1, 8, 1), (4, 16, 4), (2, 16, 8), (16, 64, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_in_every_tile(launch: tuple[int, int, int] | None, dtype: torch.dtype) -> None:
    tiles = None if launch is None else ActivationLaunch(*launch, num_warps=4)
    for shape in ((13, 21), (1, 1), (40, 130)):
        arguments = _pair(*shape, dtype)
        results = scale_pair.forward(*arguments[2:], launch=tiles)
        # One product and one rounding: there is only one right result.
        assert all(map(torch.equal, results, reference.scale_pair(*arguments[2:])))

        def backward(*args: Any) -> tuple[Tensor, ...]:
            return scale_pair.backward(*args, launch=tiles)

        assert_accurate(backward, "scale_pair_backward", *arguments, [True] * 3)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_the_backward_of_a_pair_gives_what_is_wanted_and_no_more(wanted: tuple[bool, bool, bool]) -> None:
    arguments = _pair(40, 12, torch.float32)
    whole = scale_pair.backward(*arguments, [True] * 3)
    for result, other, is_wanted in zip(scale_pair.backward(*arguments, wanted), whole, wanted, strict=True):
        assert torch.equal(result, other) if is_wanted else not result.numel()


def test_a_pair_of_shapes_strides_and_dtypes_that_differ() -> None:
    da, db, x = (torch.randn(3, 20, 4).bfloat16().transpose(1, 2) for _ in range(3))
    first, second = torch.randn(40)[::2], torch.randn(20).bfloat16()
    assert_accurate(scale_pair.forward, "scale_pair", x, first, second)
    results = scale_pair.backward(da, db, x, first, second, [True] * 3)
    assert [result.dtype for result in results] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert_accurate(lambda *_: results, "scale_pair_backward", da, db, x, first, second, [True] * 3)
    for shape in ((0, 20), (3, 0, 20), (4, 0)):
        empty, scale = torch.empty(shape), torch.randn(shape[-1])
        assert scale_pair.forward(empty, scale, scale)[1].shape == shape
        dx, *sums = scale_pair.backward(empty, empty, empty, scale, scale, [True] * 3)
        assert dx.shape == shape
        assert all(torch.equal(ds, torch.zeros_like(scale)) for ds in sums)


# --- the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_inputs_give_the_same_bits(dtype: torch.dtype) -> None:
    dh, gate, up = (torch.randn(37, 50).to(dtype) for _ in range(3))
    x, w = torch.randn(20, 200).to(dtype), torch.randn(30, 200).to(dtype)
    scale, index = torch.randn(3, 50), torch.randint(-1, 3, (37,), dtype=torch.int32)

    def run() -> list[Tensor]:
        return [
            linear.matmul(x, w, None, None, torch.ones(30), architecture=SMALL, launch=LAUNCHES["K in 3"]),
            OPERATORS["gated_activation"](gate, up, scale, "silu", index),
            *OPERATORS["gated_activation_backward"](dh, gate, up, scale, "silu", index, [True] * 3),
            *OPERATORS["gated_activation_backward"](dh, gate, up, scale[0], "silu", None, [True] * 3),
            *scale_pair.backward(dh, gate, up, scale[0], scale[1], [True] * 3),
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# --- 64-bit offsets ----------------------------------------------------------------------------------------------

STRIDE = 2**30 + 64  # the third row begins beyond 2**31 elements


def _far(rows: int, cols: int) -> Tensor:
    """A matrix whose rows are 2 GiB apart, over memory of which nothing else is ever touched."""
    storage = torch.UntypedStorage(rows * STRIDE * torch.bfloat16.itemsize)
    matrix = torch.tensor([], dtype=torch.bfloat16).set_(storage, 0, (rows, cols), (STRIDE, 1))
    return matrix.copy_(torch.randn(rows, cols))


def test_rows_beyond_2_to_the_31_elements() -> None:
    far, others = _far(3, 24), [torch.randn(3, 24).bfloat16() for _ in range(2)]
    near, scale = far.clone(), torch.randn(24)
    index = torch.tensor([1, -1, 0], dtype=torch.int32)

    def same(function: Callable[[Tensor], Any]) -> None:
        results = [function(tensor) for tensor in (far, near)]
        pairs = [results] if isinstance(results[0], Tensor) else zip(*results, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    for arguments in ((scale, "silu", None), (torch.randn(2, 24), "silu", index)):
        same(lambda t, a=arguments: OPERATORS["gated_activation"](t, others[0], *a))
        same(lambda t, a=arguments: OPERATORS["gated_activation"](others[0], t, *a))
        same(lambda t, a=arguments: OPERATORS["gated_activation_backward"](t, *others, *a, [True] * 3))
        same(lambda t, a=arguments: OPERATORS["gated_activation_backward"](others[0], t, others[1], *a, [True] * 3))
        same(lambda t, a=arguments: OPERATORS["gated_activation_backward"](*others, t, *a, [True] * 3))
    same(lambda t: scale_pair.forward(t, scale, scale))
    same(lambda t: scale_pair.backward(t, *others, scale, scale, [True] * 3))
    same(lambda t: scale_pair.backward(others[0], t, others[1], scale, scale, [True] * 3))
    same(lambda t: scale_pair.backward(*others, t, scale, scale, [True] * 3))
    for launch in (LAUNCHES["uneven tiles"], LAUNCHES["K in 2"]):
        same(lambda t, n=launch: _linear(n)(t, others[0]))
        same(lambda t, n=launch: _linear(n)(others[0], t))
    for dim, vector in ((0, scale[:3]), (1, scale)):
        weight.scale_weight_(far, vector, dim)
        weight.scale_weight_(near, vector, dim)
        assert torch.equal(far, near)
    # In place: the store goes as far as the load.
    activation.forward(far, None, scale, "relu2", None, out=far)
    assert torch.equal(far, activation.forward(near, None, scale, "relu2", None))


def test_columns_beyond_2_to_the_31_elements() -> None:
    """A Conv1D's weight, [in, out] in memory: its inputs are what is far apart."""
    far = _far(3, 24).t()
    near, x = far.clone(), torch.randn(5, 3).bfloat16()
    launch = LAUNCHES["uneven tiles"]
    assert torch.equal(_linear(launch)(x, far), _linear(launch)(x, near))
    weight.scale_weight_(far, torch.arange(24.0), 0)
    weight.scale_weight_(near, torch.arange(24.0), 0)
    assert torch.equal(far, near)


# --- whole models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matmul", ["library", "triton"])
@pytest.mark.usefixtures("place")
def test_a_llama_learns_as_with_the_reference(matmul: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import ia3

    monkeypatch.setenv("IA3_GPU_MATMUL", matmul)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = ia3.get_peft_model(LlamaForCausalLM(config), ia3.IA3Config(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    tokens = torch.randint(0, 40, (2, 7))

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        monkeypatch.setenv("IA3_BACKEND", backend)
        kernels.backends.refresh()
        model.to(dtype)
        model.zero_grad()
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        vectors = [p.grad.clone() for name, p in model.named_parameters() if "ia3_l" in name]
        assert vectors
        return [output.logits.detach(), *vectors]

    eager, ours, oracle = run("reference", torch.float32), run("triton", torch.float32), run("reference", torch.float64)
    eps = torch.finfo(torch.float32).eps
    for result, other, exact in zip(ours, eager, oracle, strict=True):
        assert error(result, exact) <= 2 * max(error(other, exact), eps)
