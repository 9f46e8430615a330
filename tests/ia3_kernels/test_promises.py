"""What the operators' docstrings promise whoever calls them: eagerly, compiled, and without the native library."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ia3_kernels as ik
from ia3_kernels import reference


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    result: Callable[..., Any] = torch.compile(function, backend="aot_eager", fullgraph=True)
    return result


@pytest.mark.parametrize("make", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_an_activation_is_never_its_input(make: Any) -> None:
    x = torch.rand(4, 8) + 1
    make(lambda x: ik.scaled_activation(x, None, "identity").mul_(0))(x)
    assert x.min() >= 1


@pytest.mark.parametrize("make", [lambda f: f, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("x", [torch.randn(8, 4).t(), torch.randn(3, 4, 8).transpose(0, 1)])
def test_an_activation_is_contiguous(make: Any, x: torch.Tensor) -> None:
    assert make(lambda x: ik.gated_activation(x, x, None))(x).is_contiguous()
    assert make(lambda x: ik.scaled_activation(x, None))(x).is_contiguous()


@pytest.mark.parametrize("make", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_one_row_may_have_an_adapter(make: Any) -> None:
    scale, index = torch.rand(2, 8, requires_grad=True), torch.tensor(1, dtype=torch.int32)
    make(lambda scale: ik.scaled_activation(torch.ones(8), scale, "identity", index))(scale).sum().backward()
    assert scale.grad is not None
    assert torch.equal(scale.grad, torch.tensor([[0.0] * 8, [1.0] * 8]))


def test_the_reference_reads_no_other_adapters_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "check_bounds", lambda index, adapters: None)  # as on a GPU
    index = torch.tensor([-1, 2, 3, 4, 5, -2], dtype=torch.int32)
    scale = torch.tensor([[10.0], [20.0], [30.0]])
    found = reference.scaled_activation(torch.ones(6, 1), scale, "identity", index).flatten()
    assert found[:2].tolist() == [1, 30]
    assert found[2:].isnan().all()


def test_both_names_of_an_operator_have_the_same_defaults() -> None:
    x, up, down = torch.randn(3, 4), torch.randn(6, 4), torch.randn(4, 6)
    assert torch.equal(torch.ops.ia3.mlp(x, up, down), ik.mlp(x, up, down))
    gate = torch.randn(6, 4)
    assert torch.equal(torch.ops.ia3.gated_mlp(x, gate, up, down), ik.gated_mlp(x, gate, up, down))


def test_what_is_no_tensor_is_a_sentence_with_out_too() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="up is of type NoneType; expected a tensor"):
        ik.gated_activation(x, None, torch.ones(4), out=torch.empty(2, 4))
    with pytest.raises((RuntimeError, TypeError)):
        ik.scaled_activation(x, 2.0, out=torch.empty(2, 4))


def test_tangents_are_refused_beside_gradients() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="forward-mode derivatives"):
        torch.func.jvp(lambda scale: ik.scaled_activation(x, scale), (torch.ones(4),), (torch.ones(4),))


def test_empty_sides_have_gradients_without_the_native_library() -> None:
    script = """
import sys
sys.modules["ia3_kernels._C"] = None
import torch, ia3_kernels as ik
for weight in (torch.randn(3, 0, requires_grad=True), torch.randn(0, 3, requires_grad=True)):
    bias = torch.zeros(len(weight), requires_grad=True)
    ik.scaled_linear(torch.randn(2, weight.shape[1]), weight, bias).sum().backward()
    assert bias.grad.tolist() == [2.0] * len(weight) and weight.grad.shape == weight.shape
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


X, INNER, OUTER = torch.randn(2, 8), torch.randn(12, 8), torch.randn(5, 12)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"gate_scale": torch.ones(7), "up_scale": torch.ones(8)}, "gated_mlp: gate_scale has shape [7]; expected [8]"),
        ({"up_scale": torch.ones(9)}, "gated_mlp: up_scale has shape [9]; expected [8]"),
        ({"scale": torch.ones(12).int()}, "gated_mlp: scale has dtype torch.int32; expected a floating-point dtype."),
        ({"gate_weight": torch.randn(11, 8)}, "gated_mlp: gate_weight has shape [11, 8]; expected [12, 8]."),
        ({"down_weight": torch.randn(5, 11)}, "gated_mlp: down_weight has shape [5, 11]; expected [N, 12]."),
        ({"x": X.double()}, "gated_mlp: up_weight has dtype torch.float32, but x has torch.float64; convert one"),
        ({"activation": "tanh"}, "gated_activation: activation is 'tanh'; expected one of"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_a_gated_block_names_its_own_arguments(changed: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"x": X, "gate_weight": INNER, "up_weight": INNER, "down_weight": OUTER}
    with pytest.raises(RuntimeError, match=re.escape(sentence)) as caught:
        ik.gated_mlp(**given | changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"scale": torch.ones(11)}, "mlp: scale has shape [11]; expected [12]"),
        ({"up_bias": torch.ones(11)}, "mlp: up_bias has shape [11]; expected [12]."),
        ({"down_bias": torch.ones(1, 5)}, "mlp: down_bias has shape [1, 5]; expected [5]."),
        ({"up_weight": torch.randn(12)}, "mlp: up_weight has shape [12]; expected [I, 8]."),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_a_plain_block_names_its_own_arguments(changed: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"x": X, "up_weight": INNER, "down_weight": OUTER}
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        ik.mlp(**given | changed)
