"""What compilers and exporters see: the formulas against the operators, values and gradients, adapters in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3_kernels as kernels
from ia3_kernels import formulas

from .helpers import DTYPES, error

ROWS, K, N, A = 7, 12, 10, 3
INDEX = torch.tensor([0, -1, 2, 1, 0, 2, -1], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _cases(dtype: torch.dtype, has_adapters: bool) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Every public function as one of its tensors, with leaves."""
    index = INDEX if has_adapters else None
    leading = (A,) if has_adapters else ()
    x, up = (torch.randn(ROWS, K).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
    s_k, s_n = 1 + 0.3 * torch.randn(*leading, K), 1 + 0.3 * torch.randn(*leading, N)
    cases: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "scaled_linear": (
            lambda x, w, b, i, o: kernels.scaled_linear(x, w, b, i, o, index),
            [x, weight, bias, s_k, s_n],
        ),
        "a vector beside": (
            lambda x, w, i, o: kernels.scaled_linear(x, w, None, i, o if index is None else o[0], index),
            [x, weight, s_k, s_n],
        ),
        "one side": (lambda x, w, o: kernels.scaled_linear(x, w, None, None, o, index), [x, weight, s_n]),
        "gated_activation": (lambda g, u, s: kernels.gated_activation(g, u, s, "silu", index), [x, up, s_k]),
        "scaled_activation": (lambda x, s: kernels.scaled_activation(x, s, "gelu_tanh", index), [x, s_k]),
    }
    if not has_adapters:
        weights = [weight, weight.flip(0), weight.t().contiguous()]
        cases["gated_mlp"] = (
            lambda x, s, g, u: kernels.gated_mlp(x, *(w.to(x.dtype) for w in weights), s, "silu", g, u),
            [x, s_n, s_k, s_k.flip(0)],
        )
        cases["mlp"] = (
            lambda x, s: kernels.mlp(x, weight.to(x.dtype), weights[2].to(x.dtype), s, "relu", bias.to(x.dtype)),
            [x, s_n],
        )
        cases["PEFT's shapes"] = (
            lambda x, w, i, o: kernels.scaled_linear(x, w, None, i, o),
            [x, weight, s_k.reshape(1, K), s_n.reshape(N, 1)],
        )
    return cases


def _run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize("has_adapters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(_cases(torch.float32, False)))
def test_a_compiled_function_computes_what_the_operator_does(
    name: str, dtype: torch.dtype, has_adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = _cases(dtype, has_adapters)
    if name not in cases:
        pytest.skip("a block takes no adapters")
    function, tensors = cases[name]
    monkeypatch.setattr(formulas, "_OPAQUE_MATMULS", frozenset())
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    exact = _run(function, [tensor.double() for tensor in tensors])
    for result, eager, oracle in zip(_run(compiled, tensors), _run(function, tensors), exact, strict=True):
        assert result.dtype == eager.dtype
        assert result.shape == eager.shape
        # Rounded at other places: once, behind the matmul's own rounding.
        assert error(result, oracle) <= 2 * max(error(eager, oracle), 2 * torch.finfo(dtype).eps)
    assert len(graphs) == 1
    assert not [node for node in graphs[0].graph.nodes if str(node.target).startswith("ia3")]


@pytest.mark.parametrize("wrong", [-2, A, 2**30])
def test_an_index_outside_of_the_matrix_gives_nan_and_reads_nothing(wrong: int) -> None:
    function, (x, scale) = _cases(torch.float32, True)["scaled_activation"]
    index = INDEX.clone()
    index[3] = wrong
    compiled = torch.compile(
        lambda x, s, i: kernels.scaled_activation(x, s, "gelu_tanh", i), backend="aot_eager", fullgraph=True
    )
    h = compiled(x, scale, index)
    assert torch.isnan(h[3]).all()
    others = [row for row in range(ROWS) if row != 3]
    torch.testing.assert_close(h[others], function(x, scale)[others])


def test_gradients_of_adapters_are_no_atomic_sums() -> None:
    function, tensors = _cases(torch.float32, True)["gated_activation"]
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def step(*leaves: Tensor) -> Any:
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    from torch._dynamo.backends.common import aot_autograd

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend), fullgraph=True)
    compiled(*leaves).sum().backward()
    assert any("mm" in target for target in seen)
    assert not [target for target in seen if "index_add" in target or "index_put" in target or "scatter" in target]
    for leaf, expected in zip(leaves, step(*[leaf.detach().requires_grad_() for leaf in leaves]), strict=True):
        torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("is_opaque", [False, True])
def test_autocast_is_traced(is_opaque: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "_OPAQUE_MATMULS", frozenset({torch.bfloat16} if is_opaque else ()))
    for name in ("scaled_linear", "gated_mlp", "mlp"):
        function, tensors = _cases(torch.float32, False)[name]
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        exact = _run(function, [tensor.double() for tensor in tensors])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # A layer's output is already in bf16, its weight is not.
            mixed = [tensors[0].bfloat16(), *tensors[1:]]
            for result, eager, oracle in zip(_run(compiled, mixed), _run(function, mixed), exact, strict=True):
                assert result.dtype == eager.dtype
                limit = 2 * max(error(eager, oracle), 2 * torch.finfo(torch.bfloat16).eps)
                assert error(result, oracle) <= limit, name


def test_bad_arguments_get_their_sentence_from_a_trace_too() -> None:
    compiled = torch.compile(lambda x, s: kernels.scaled_activation(x, s), backend="eager")
    with pytest.raises(RuntimeError, match=r"scaled_activation: scale has shape \[5\]; expected \[12\]"):
        compiled(torch.randn(3, 12), torch.ones(5))
