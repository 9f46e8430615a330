"""What every operator promises around its arithmetic: registration, messages, compile, autocast, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import ia3_kernels as kernels
from ia3_kernels import backends, reference, target

from .helpers import error, needs_native

ops = torch.ops.ia3


def _samples(dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    x, weight, bias = torch.randn(3, 6).to(dtype), torch.randn(5, 6).to(dtype), torch.randn(5).to(dtype)
    gate, up = torch.randn(2, 3, 6).to(dtype), torch.randn(2, 3, 6).to(dtype)
    s6, s5, s26 = torch.randn(6), torch.randn(5), torch.randn(2, 6)
    index = torch.tensor([[0, 1, -1], [1, 1, 0]], dtype=torch.int32)

    def grad(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_()

    return [
        (ops.scaled_linear, (x, weight)),
        (ops.scaled_linear, tuple(map(grad, (x, weight, bias, s6, s5)))),
        (ops.scaled_linear, (grad(gate), weight, None, grad(s26), None, index)),
        (ops.gated_activation, tuple(map(grad, (gate, up, s6)))),
        (ops.gated_activation, (gate, up, None, "relu2")),
        (ops.gated_activation, (grad(gate), grad(up), grad(s26), "gelu", index)),
        (ops.scaled_activation, (grad(x), grad(s6), "gelu_tanh")),
        (ops.scale_weight_, (weight.clone(), s6, 1)),
        (ops.gated_activation_backward, (gate, gate, up, s6, "silu", None, [True, False, True])),
        (ops.scaled_activation_backward, (x, x, s6, "silu", None, [True, True])),
        (ops.scaled_linear_product, (x, weight, bias, s6, s5, None)),
        (ops.scale_pair, (gate, s6, torch.randn(6))),
        (ops.scale_pair_backward, (gate, up, gate, s6, s6, [True, False, True])),
        (ops.gated_mlp, (grad(gate), weight, weight.clone(), weight.t().contiguous(), grad(s5))),
        (ops.gated_mlp, (grad(x), weight, weight.clone(), weight.t().contiguous(), None, "gelu", grad(s6), grad(s6))),
        (ops.mlp, (grad(x), weight, weight.t().contiguous(), grad(s5), "relu", bias, None)),
    ]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sample", range(16))
def test_opcheck(dtype: torch.dtype, sample: int) -> None:
    operator, args = _samples(dtype)[sample]
    # Traced, the unscaled product is kept, and in bf16 it rounds where the output does not: hence the tolerance.
    eps = torch.finfo(dtype).eps
    opcheck(operator, args, rtol=8 * eps, atol=8 * eps)


# --- bad arguments -----------------------------------------------------------------------------------------------

X, W, S6 = torch.randn(3, 6), torch.randn(5, 6), torch.randn(6)
INDEX = torch.zeros(3, dtype=torch.int32)
BAD: list[tuple[str, tuple[Any, ...], str]] = [
    ("scaled_linear", (X, torch.randn(5, 7)), r"scaled_linear: x has shape \[3, 6\].*in_features 7"),
    ("scaled_linear", (X, torch.randn(5)), r"scaled_linear: weight has shape \[5\]; expected \[out, in\]"),
    ("scaled_linear", (X, W.bfloat16()), r"weight has dtype .*[bB][fF].*16, but x has"),
    ("scaled_linear", (X, W, torch.randn(4)), r"bias has shape \[4\]; expected \[5\]"),
    ("scaled_linear", (X, W, None, torch.randn(5)), r"input_scale has shape \[5\]; expected \[6\]"),
    ("scaled_linear", (X, W, None, None, S6), r"output_scale has shape \[6\]; expected \[5\]"),
    ("scaled_linear", (X, W, None, torch.ones(2, 6)), r"two-dimensional scale also needs adapter_index"),
    (
        "scaled_linear",
        (X, W, None, torch.ones(2, 5), None, INDEX),
        r"expected \[adapters, 6\] because adapter_index is given",
    ),
    ("scaled_linear", (X, W, None, S6, None, INDEX), r"no scale to index; expected one of shape \[adapters, n\]"),
    ("scaled_linear", (X, W, None, None, None, INDEX), r"adapter_index is given, but no scale to index"),
    ("scaled_linear", (X, W, None, torch.ones(2, 6), None, INDEX.long()), r"expected torch.int32"),
    ("scaled_linear", (X, W, None, torch.ones(2, 6), None, INDEX[:2]), r"adapter_index has shape \[2\].*\[3\]"),
    ("scaled_linear", (X, W, None, torch.ones(6, dtype=torch.int32)), r"input_scale has dtype .*floating-point"),
    ("gated_activation", (X, torch.randn(3, 5)), r"up has shape \[3, 5\], but gate has \[3, 6\]"),
    ("gated_activation", (X, X.bfloat16()), r"up has dtype .*, but gate has"),
    ("gated_activation", (X, X, S6, "swish"), r"activation is 'swish'; expected one of silu, gelu"),
    ("scaled_activation", (torch.tensor(1.0),), r"x has no dimensions"),
    ("scaled_activation", (X, torch.ones(7)), r"scale has shape \[7\]; expected \[6\]"),
    # A block's public function names its own arguments, and where only the dispatcher is asked an operator in it does.
    ("gated_mlp", (X, W, W, W), r"down_weight has shape \[5, 6\]; expected \[N, 5\]|but weight has in_features 6"),
    (
        "gated_mlp",
        (X, W, torch.randn(4, 6), W.t()),
        r"gate_weight has shape \[5, 6\]; expected \[4, 6\]|but gate has \[3, 5\]",
    ),
    ("gated_mlp", (X, W, W, W.t(), S6), r"scale has shape \[6\]; expected \[5\]"),
    ("mlp", (X, W, W.t(), None, "silu", torch.randn(4)), r"bias has shape \[4\]; expected \[5\]"),
    ("scale_weight_", (W.clone(), S6, 2), r"dim is 2; expected 0 .* or 1"),
    ("scale_weight_", (W.clone(), S6, 0), r"scale has shape \[6\]; expected \[5\]"),
]


def _here(tensor: Tensor) -> Tensor:
    """The tensor on the device where the test makes its tensors."""
    return tensor.to(torch.empty(0).device)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("case", range(len(BAD)))
@pytest.mark.parametrize("path", ["public", "dispatcher", "reference", "fake"])
def test_bad_arguments_get_a_sentence(case: int, path: str) -> None:
    name, args, message = BAD[case]
    args = tuple(_here(arg) if isinstance(arg, Tensor) else arg for arg in args)
    first_needs_grad = name != "scale_weight_"
    call: Callable[..., Any] = {
        "public": lambda *a: getattr(kernels, name)(*a),
        "dispatcher": lambda x, *a: getattr(ops, name)(x.clone().requires_grad_(first_needs_grad), *a),
        "reference": reference.OPERATORS.get(name, getattr(kernels, name)),
        "fake": lambda *a: getattr(ops, name)(*(t.to("meta") if isinstance(t, Tensor) else t for t in a)),
    }[path]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(*args)


@pytest.mark.parametrize("wrong", [-2, 2])
@pytest.mark.parametrize("function", [kernels.scaled_activation, reference.scaled_activation])
def test_an_adapter_index_out_of_range_is_never_read(function: Callable[..., Any], wrong: int) -> None:
    index = torch.tensor([0, wrong, 1], dtype=torch.int32)
    with pytest.raises(IndexError, match=f"adapter_index holds {wrong}; expected -1 .* to 1"):
        function(X, torch.ones(2, 6), "silu", index)


def test_unsupported_dtypes_and_devices_get_a_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"x has dtype torch\.int64; expected one of torch\.float32, "):
        kernels.scaled_activation(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="weight is on meta, but x is on cpu"):
        kernels.scaled_linear(X, W.to("meta"))


@pytest.mark.usefixtures("place")
def test_scaling_a_weight_in_place_is_not_differentiable() -> None:
    with pytest.raises(RuntimeError, match=r"call it under torch.no_grad\(\)"):
        kernels.scale_weight_(_here(W).clone().requires_grad_(), _here(S6), 1)
    weight = _here(W).clone()
    version = weight._version
    assert kernels.scale_weight_(weight, _here(S6), 1) is weight
    assert weight._version > version


# --- compile, autocast, modes ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph_with_its_backward(dynamic: bool) -> None:
    def model(x: Tensor, weight: Tensor, s5: Tensor, up: Tensor, s6: Tensor) -> Tensor:
        hidden = kernels.gated_activation(x, up, s6, "gelu_tanh")
        return kernels.scaled_linear(hidden, weight, None, None, s5).square().sum()

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 20):
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((rows, 6), (5, 6), (5,), (rows, 6), (6,))]
        expected = torch.autograd.grad(model(*leaves), leaves)
        for result, other in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-5)


def test_inductor_runs_the_same_operators() -> None:
    def model(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        weight = kernels.scale_weight_(weight.clone(), scale, 0)
        return kernels.scaled_linear(x + 1, weight, None, None, scale) * 2

    args = (torch.randn(3, 6), torch.randn(5, 6), torch.randn(5))
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(*args), model(*args))


def test_autocast_does_what_it_does_for_linear() -> None:
    x, weight, scale = torch.randn(3, 6), torch.randn(5, 6, requires_grad=True), torch.randn(5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.scaled_linear(x, weight, None, None, scale)
        plain = torch.nn.functional.linear(x, weight)
        with torch.no_grad():
            unrecorded = kernels.scaled_linear(x, weight, None, None, scale)
        with torch.autocast("cpu", enabled=False):
            assert kernels.scaled_linear(x, weight).dtype == torch.float32
    assert y.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(y, unrecorded)
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert scale.grad is not None
    assert scale.grad.dtype == torch.float32
    assert error(y.detach(), (plain.float() * scale).bfloat16().detach()) < 2 * torch.finfo(torch.bfloat16).eps


def test_modes_and_subclasses_reach_the_dispatcher() -> None:
    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder() as recorder:
        kernels.scaled_linear(X, W)
        kernels.gated_activation(X, X)
        kernels.scaled_activation(X)
    assert recorder.seen == [f"ia3.{op}.default" for op in ("scaled_linear", "gated_activation", "scaled_activation")]

    with torch._subclasses.FakeTensorMode():
        fake = kernels.scaled_linear(torch.empty(2, 6), torch.empty(5, 6))
    assert type(fake) is torch._subclasses.FakeTensor
    assert fake.shape == (2, 5)


@needs_native
def test_the_fast_path_leaves_to_torch_what_it_cannot_do() -> None:
    fast: Any = target.native_library().fast  # type: ignore[union-attr]
    arguments = (X, W, None, S6, None, None)
    parameters = tuple(torch.nn.Parameter(a) if isinstance(a, Tensor) else a for a in arguments)
    expected = kernels.scaled_linear(X, W, None, S6)
    assert torch.equal(fast.scaled_linear(*arguments), expected)
    assert torch.equal(fast.scaled_linear(*parameters), expected)
    assert fast.scaled_linear(*parameters).grad_fn is not None
    assert fast.scaled_linear(X.tolist(), *arguments[1:]) is None
    assert fast.scaled_linear(X) is None
    assert fast.gated_activation(X, X, S6, 3, None) is None
    with torch.overrides.TorchFunctionMode():
        assert fast.scaled_linear(*arguments) is None
    with torch._subclasses.FakeTensorMode() as mode:
        assert fast.scaled_linear(mode.from_tensor(X), mode.from_tensor(W), None, None, None, None) is None


def test_what_is_neither_tensor_nor_none_gets_a_sentence() -> None:
    with pytest.raises((RuntimeError, TypeError), match="scaled_linear"):
        kernels.scaled_linear([1.0], W)  # type: ignore[arg-type]


@pytest.mark.usefixtures("place")
def test_forward_mode_differentiation_is_refused() -> None:
    x, weight, scale = (_here(t) for t in (X, W, S6))
    mask = [True, True]
    calls: list[Callable[[Tensor], Any]] = [
        lambda x: kernels.scaled_linear(x, weight, None, scale),
        lambda x: kernels.scaled_activation(x, scale),
        lambda x: kernels.gated_activation(x, x, scale),
        lambda x: kernels.gated_mlp(x, weight, weight, weight.t()),
        lambda x: kernels.mlp(x, weight, weight.t()),
        lambda x: kernels.scale_weight_(x, scale, 1),
        lambda x: kernels.scaled_activation(X, scale, out=x),
        lambda x: kernels.merge_(x, scale, 1),
        lambda x: kernels.merge_(weight.clone(), x[0], 1, exact=True),
        lambda x: ops.scaled_activation_backward(x, x, scale, "silu", None, mask)[0],
        lambda x: ops.scale_pair(x, scale, scale)[0],
    ]
    for call in calls:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            for mode in (torch.enable_grad, torch.no_grad):
                with mode(), pytest.raises(RuntimeError, match=r"forward-mode derivatives|forward AD"):
                    call(dual)
        for transform in (torch.func.jacfwd, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
            with pytest.raises(RuntimeError, match=r"forward-mode derivatives|forward AD"):
                transform(call)(x.clone())


@pytest.mark.usefixtures("place")
def test_results_are_written_where_the_caller_says() -> None:
    gate, up, scale = (torch.randn(4, 6) for _ in range(3))
    scale = scale[0]
    out = torch.full_like(gate, float("nan"))
    assert kernels.gated_activation(gate, up, scale, out=out) is out
    assert torch.equal(out, kernels.gated_activation(gate, up, scale))
    version = out._version
    assert kernels.scaled_activation(gate, scale, "relu", out=out) is out
    assert torch.equal(out, kernels.scaled_activation(gate, scale, "relu"))
    assert out._version > version
    for wrong in (out[:3], out.double(), torch.empty(6, 4).t()):
        with pytest.raises(RuntimeError, match=r"scaled_activation: out is .*; expected a contiguous"):
            kernels.scaled_activation(gate, scale, out=wrong)
    with pytest.raises(RuntimeError, match="out is given where a gradient is recorded"):
        kernels.scaled_activation(gate.clone().requires_grad_(), scale, out=out)


def test_a_first_call_in_inference_mode_leaves_training_working() -> None:
    # The widened matmul keeps scratch between calls; it must not be an inference tensor.
    x, weight = torch.randn(40, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    with torch.inference_mode():
        first = kernels.scaled_linear(x.repeat(50, 1), weight)
    x.requires_grad_()
    kernels.scaled_linear(x, weight).sum().backward()
    assert first.is_inference()
    assert x.grad is not None


# --- what a call may come with -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_what_out_hides_from_is_found() -> None:
    gate, up, scale = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    out = torch.empty(4, 6)
    for inputs in ((gate, up, scale.clone().requires_grad_()), (gate, up.clone().requires_grad_(), scale)):
        with pytest.raises(RuntimeError, match="out is given where a gradient is recorded"):
            kernels.gated_activation(*inputs, out=out)
    both = torch.randn(30)
    with pytest.raises(RuntimeError, match="single memory location"):
        kernels.scaled_activation(both[:24].view(4, 6), scale, out=both[6:].view(4, 6))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = kernels.scaled_activation(mode.from_tensor(gate), out=mode.from_tensor(out))
    assert fake.shape == (4, 6)
    zero = torch._efficientzerotensor((4, 6), device=gate.device)
    assert torch.equal(kernels.scaled_activation(zero, None, "relu", out=out), torch.zeros(4, 6))


@pytest.mark.parametrize("name", ["scaled_linear", "gated_mlp", "mlp"])
def test_backward_runs_inside_of_autocast_as_well(name: str) -> None:
    x, weight, scale = torch.randn(3, 6, requires_grad=True), torch.randn(6, 6), torch.randn(6, requires_grad=True)
    call: Callable[[], Tensor] = {
        "scaled_linear": lambda: kernels.scaled_linear(x, weight, None, None, scale),
        "gated_mlp": lambda: kernels.gated_mlp(x, weight, weight, weight, scale),
        "mlp": lambda: kernels.mlp(x, weight, weight, scale),
    }[name]
    expected = torch.autograd.grad(call().sum(), (x, scale))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = call()
        results = torch.autograd.grad(y.sum(), (x, scale))
    assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("freed", ["x", "weight", "bias", "scale"])
def test_a_tensor_whose_memory_was_freed_is_refused(freed: str) -> None:
    tensors = {"x": torch.randn(3, 6), "weight": torch.randn(6, 6), "bias": torch.randn(6), "scale": torch.randn(6)}
    tensors[freed].untyped_storage().resize_(0)
    x, weight, bias, scale = tensors.values()
    with pytest.raises(RuntimeError):
        kernels.scaled_linear(x, weight, bias, None, scale)
    if freed in ("x", "scale"):
        with pytest.raises(RuntimeError):
            kernels.gated_activation(x, x, scale)


@pytest.mark.usefixtures("place")
def test_a_write_is_noted_in_inference_mode_too() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    y = x @ weight.t()
    with torch.inference_mode():
        kernels.scale_weight_(weight, torch.full((4,), 2.0), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_merging_is_noted_in_inference_mode_too() -> None:
    weight, scale = torch.randn(5, 4), torch.full((4,), 3.0)
    with torch.inference_mode():
        version = weight._version
        residual = kernels.merge_(weight, scale, 1, exact=True)
        merged = weight._version
        assert residual is not None
        kernels.unmerge_(weight, scale, 1, residual)
    assert version < merged < weight._version


@pytest.mark.usefixtures("place")
def test_a_weight_that_overlaps_itself_or_its_scale_is_refused() -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        kernels.scale_weight_(torch.ones(1, 4).expand(3, 4), torch.full((4,), 2.0), 1)
    weight = torch.full((40, 4), 3.0)
    with pytest.raises(RuntimeError, match=r"single memory location|overlap"):
        kernels.scale_weight_(weight, weight[0], 1)


@pytest.mark.usefixtures("place")
def test_gradients_of_another_shape_are_refused() -> None:
    x, scale = torch.randn(30, 4), torch.randn(4)
    with pytest.raises(RuntimeError, match=r"scale_pair: the gradient has shape \[1, 4\]; expected .*\[30, 4\]"):
        ops.scale_pair_backward(torch.randn(1, 4), torch.randn(1, 4), x, scale, scale, [True] * 3)
    with pytest.raises(RuntimeError, match="the gradient has dtype"):
        ops.scaled_activation_backward(x.bfloat16(), x, scale, "silu", None, [True, True])


def test_nothing_in_some_dimension(place: str) -> None:
    index = torch.zeros(0, dtype=torch.int32)
    dtypes = (torch.float32,) if place == "triton" else (torch.float32, torch.float64)
    for dtype in dtypes:
        assert kernels.scaled_activation(torch.empty(0, 4, dtype=dtype), torch.randn(2, 4), "silu", index).shape == (
            0,
            4,
        )
    for rows, inputs, outputs in ((3, 4, 0), (3, 0, 4), (0, 4, 3)):
        weight = torch.randn(outputs, inputs, requires_grad=True)
        kernels.scaled_linear(torch.randn(rows, inputs), weight).sum().backward()
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
    x = torch.empty(3, 0, requires_grad=True)
    kernels.gated_mlp(x, torch.empty(5, 0), torch.empty(5, 0), torch.randn(0, 5), torch.ones(5)).sum().backward()
    bias = torch.randn(3)
    y = kernels.scaled_linear(torch.empty(1, 0), torch.empty(3, 0), bias)
    assert torch.equal(y[0], bias)
    assert y.data_ptr() != bias.data_ptr()


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(RuntimeError, match="scaled_linear: weight is of type NoneType; expected a tensor"):
        kernels.scaled_linear(X, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="gated_activation: up is of type NoneType; expected a tensor"):
        kernels.gated_activation(X, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="scale_weight_"):
        kernels.scale_weight_(W.clone(), S6, 2**70)
    with pytest.raises((RuntimeError, UnicodeError)):
        kernels.scaled_activation(X, None, "\ud800")


def test_a_trace_on_the_meta_device_sees_the_formula() -> None:
    compiled = torch.compile(kernels.scaled_linear, backend="aot_eager", fullgraph=True)
    y = compiled(torch.randn(3, 4, device="meta"), torch.randn(5, 4, device="meta"))
    assert y.shape == (3, 5)


# --- what backward keeps -----------------------------------------------------------------------------------------


def _kept(function: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The function's result, and the tensors that its graph keeps."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), kept


@pytest.mark.usefixtures("place")
def test_an_input_scale_behind_an_activation_keeps_gate_and_up_alone() -> None:
    gate, up = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    scale = torch.randn(6, requires_grad=True)
    _, kept = _kept(lambda: kernels.gated_activation(gate, up, scale))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (gate, up, scale)}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.add_(1.0), lambda y: y.mul_(2.0)])
def test_an_output_may_be_written_over(change: Callable[[Tensor], Tensor]) -> None:
    """What stands behind a layer may work in place (``nn.ReLU(inplace=True)``, ``y += residual``)."""
    leaves = [torch.randn(shape).requires_grad_() for shape in ((3, 6), (5, 6), (5,), (6,), (5,))]
    x, weight, bias, input_scale, output_scale = leaves
    results, expected = (
        torch.autograd.grad(change(y).square().sum(), leaves)
        for y in (
            kernels.scaled_linear(x, weight, bias, input_scale, output_scale),
            torch.nn.functional.linear(x * input_scale, weight, bias) * output_scale,
        )
    )
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("place")
def test_an_output_scale_keeps_the_product_and_not_x() -> None:
    x, scale = torch.randn(3, 6, requires_grad=True), torch.randn(5, requires_grad=True)
    weight = _here(W)
    y, kept = _kept(lambda: kernels.scaled_linear(x, weight, None, None, scale))
    (product,) = (t for t in kept if t.shape == y.shape)
    torch.testing.assert_close(product, x.detach() @ weight.t())
    assert not any(t.data_ptr() == x.data_ptr() for t in kept)


@needs_native
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("scales_inputs", [False, True])
def test_a_block_keeps_gate_and_up_alone(scales_inputs: bool) -> None:
    x, scale = torch.randn(4, 6, requires_grad=True), torch.randn(5, requires_grad=True)
    gate_weight, up_weight, down_weight = torch.randn(5, 6), torch.randn(5, 6), torch.randn(6, 5)
    pair = [torch.randn(6, requires_grad=True) for _ in range(2)] if scales_inputs else []
    _, kept = _kept(lambda: kernels.gated_mlp(x, gate_weight, up_weight, down_weight, scale, "silu", *pair))
    known = {t.data_ptr() for t in (gate_weight, up_weight, down_weight, scale, *pair)}
    others = [t for t in kept if t.data_ptr() not in known]
    assert sum(t.shape == (4, 5) for t in others) == 2
    assert [t.data_ptr() for t in others if t.shape != (4, 5)] == ([x.data_ptr()] if scales_inputs else [])


# --- backends ----------------------------------------------------------------------------------------------------


def test_explain_names_the_backend_and_the_reason() -> None:
    choice = kernels.explain("gated_activation", "cpu", torch.float64)
    assert choice.backend == "reference"
    assert "no float64 kernels" in choice.reason or "not built" in choice.reason
    with pytest.raises(ValueError, match="there is no operator 'matmul'"):
        kernels.explain("matmul")


def test_backends_by_name() -> None:
    assert backends.get("reference").name == "reference"
    names = ["native", "cuda", "triton", "reference"]
    with pytest.raises(ValueError, match=f"there is no backend 'tpu'; expected one of {str(names)[1:-1]}"):
        backends.get("tpu")
    assert [status.name for status in backends.report()] == names
