"""A route that only CUDA graphs take: in a capture, once its kernel was compiled and loaded outside of one.

On CPU tensors, with the emulated CUDA kernels and a Triton kernel that only notes its calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3_kernels as kernels
from ia3_kernels import backends, routes
from ia3_kernels.routes import Route

from . import emulated, emulated_bindings

pytestmark = pytest.mark.skipif(not emulated_bindings.AVAILABLE, reason="nothing compiles the CUDA emulator here")


class Graph:
    """Whether the stream is being captured, and what the Triton kernel was called with."""

    def __init__(self) -> None:
        self.by_triton: list[tuple[Tensor, ...]] = []
        self._is_capturing = ctypes.c_int.in_dll(emulated.library(), "emulator_is_capturing")

    def is_captured(self, is_captured: bool) -> None:
        self._is_capturing.value = is_captured

    def kernel(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        self.by_triton.append((x, weight, *args))
        return x.new_full((*x.shape[:-1], weight.shape[0]), 7.0)


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    graph = Graph()

    def route(index: int | None, product: Any, available: Any, is_captured: bool, has_adapters: bool) -> Route:
        return Route("triton" if is_captured else "library", "said so")

    monkeypatch.setattr(routes, "linear_route", route)
    monkeypatch.setattr(backends, "linear_by_triton", graph.kernel)
    with emulated_bindings.backend(monkeypatch, matmul="auto"):
        yield graph
    graph.is_captured(False)


def _tensors(rows: int = 4) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 32), "weight": torch.randn(16, 32), "output_scale": torch.randn(16)}


def _expected(x: Tensor, weight: Tensor, output_scale: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight) * output_scale


def test_outside_of_a_graph_the_kernel_runs_once_and_its_result_is_dropped(graph: Graph) -> None:
    tensors = _tensors()
    for _ in range(3):
        torch.testing.assert_close(kernels.scaled_linear(**tensors), _expected(**tensors))
        assert len(graph.by_triton) == 1
    graph.is_captured(True)
    assert torch.all(kernels.scaled_linear(**tensors) == 7)
    assert len(graph.by_triton) == 2
    graph.is_captured(False)
    torch.testing.assert_close(kernels.scaled_linear(**tensors), _expected(**tensors))
    assert len(graph.by_triton) == 2


def test_a_capture_without_a_call_before_it_takes_the_other_route(graph: Graph) -> None:
    tensors = _tensors()
    graph.is_captured(True)
    for _ in range(2):
        torch.testing.assert_close(kernels.scaled_linear(**tensors), _expected(**tensors))
    assert not graph.by_triton
    graph.is_captured(False)
    kernels.scaled_linear(**tensors)
    graph.is_captured(True)
    assert torch.all(kernels.scaled_linear(**tensors) == 7)


def test_each_program_that_triton_would_compile_is_prepared_for_itself(graph: Graph) -> None:
    whole = _tensors()
    calls: list[dict[str, Any]] = [
        whole,
        _tensors(rows=3),
        whole | {"bias": torch.randn(16)},
        whole | {"output_scale": torch.randn(16).bfloat16()},
        whole | {"x": torch.randn(4 * 32 + 1)[1:].view(4, 32)},  # 4 bytes off
        whole | {"x": torch.randn(4, 33)[:, :32]},  # rows that lie apart
        whole | {"weight": torch.randn(32, 16).t()},
        {name: tensor for name, tensor in whole.items() if name != "output_scale"} | {"input_scale": torch.randn(32)},
        *(
            whole | {"output_scale": torch.randn(n, 16), "adapter_index": torch.zeros(4, dtype=torch.int32)}
            for n in (2, 3)
        ),
    ]
    for count, call in enumerate(calls, start=1):
        for _ in range(2):
            kernels.scaled_linear(**call)
            assert len(graph.by_triton) == count
    kernels.scaled_linear(**_tensors())  # other tensors of the first kind
    assert len(graph.by_triton) == len(calls)


def test_what_a_gradient_keeps_is_the_library_s(graph: Graph) -> None:
    tensors = _tensors()
    tensors["output_scale"].requires_grad_()
    kernels.scaled_linear(**tensors).sum().backward()
    assert not graph.by_triton
