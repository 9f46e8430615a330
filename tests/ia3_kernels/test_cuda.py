"""What only a GPU can show: graphs, streams, a second device, more than 2³¹ elements. ``make gpu-check`` runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3_kernels as kernels
from ia3_kernels import backends, target

from .helpers import assert_accurate

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("backend"),
]


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both sets of GPU kernels, each with its own matmul."""
    problem = {"triton": target.triton_problem, "cuda": target.cuda_problem}[request.param]()
    if problem is not None:
        pytest.skip(problem)
    monkeypatch.setenv(target.BACKEND_VARIABLE, request.param)
    monkeypatch.setenv(target.GPU_MATMUL_VARIABLE, request.param)
    backends.refresh()
    yield request.param
    monkeypatch.undo()
    backends.refresh()


def _calls(device: str = "cuda") -> dict[str, tuple[Callable[..., Tensor], list[Any]]]:
    """An operator and its tensors each, of which the first is written anew before a replay."""
    x, up = (torch.randn(96, 256, device=device).bfloat16() for _ in range(2))
    weight = torch.randn(128, 256, device=device).bfloat16()
    scale, vectors = torch.randn(128, device=device), torch.randn(3, 256, device=device)
    index = torch.randint(-1, 3, (96,), device=device, dtype=torch.int32)
    return {
        "scaled_linear": (lambda x, w, s: kernels.scaled_linear(x, w, output_scale=s), [x, weight, scale]),
        "gated_activation": (lambda g, u, s: kernels.gated_activation(g, u, s), [x, up, vectors[0]]),
        "adapters": (lambda g, u, s, i: kernels.gated_activation(g, u, s, "silu", i), [x, up, vectors, index]),
        "gated_mlp": (
            lambda x, g, u, d, s, a, b: kernels.gated_mlp(x, g, u, d, s, "silu", a, b),
            [x, weight, weight.flip(0), weight.t().contiguous(), scale, vectors[1], vectors[2]],
        ),
        "scaled_activation": (lambda x, s: kernels.scaled_activation(x, s, "gelu"), [x, vectors[0]]),
    }


@pytest.mark.parametrize("name", list(_calls("cpu")))
def test_a_captured_graph_computes_what_its_inputs_hold_at_replay(name: str) -> None:
    operator, tensors = _calls()[name]
    operator(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(*tensors)
    tensors[0].copy_(torch.randn_like(tensors[0]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, operator(*tensors))


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_a_captured_matmul_takes_the_route_that_explain_names(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice that is made where nobody asks for one; in a graph it may be another than outside."""
    monkeypatch.setenv(target.GPU_MATMUL_VARIABLE, "auto")
    backends.refresh()
    x, weight = (torch.randn(size, 512, device="cuda").bfloat16() for size in (rows, 256))
    scale = torch.randn(256, device="cuda")
    kernels.scaled_linear(x, weight, output_scale=scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.scaled_linear(x, weight, output_scale=scale)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    assert_accurate(lambda *_: captured, "scaled_linear", x, weight, None, None, scale)
    words = kernels.explain("scaled_linear", "cuda", torch.bfloat16, (rows, 256, 512)).reason
    by_triton = "matmul: Triton" in words or "inside of a CUDA graph Triton" in words
    names = {event.key for event in profile.key_averages()}
    assert by_triton == any("linear_fwd_kernel" in name for name in names), (words, names)


def test_a_captured_backward_gives_the_same_bits() -> None:
    gate, up = (torch.randn(96, 256, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    scale = torch.randn(256, device="cuda").requires_grad_()
    grad = torch.randn(96, 256, device="cuda").bfloat16()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kernels.gated_activation(gate, up, scale), (gate, up, scale), grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("name", list(_calls("cpu")))
def test_kernels_run_on_the_current_stream(name: str) -> None:
    operator, tensors = _calls()[name]
    expected = operator(*tensors)
    first = tensors[0].clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tensors[0].copy_(first.flip(0))  # what runs before this on another stream sees the old values
        tensors[0].copy_(first)
        late = operator(*tensors)
    stream.synchronize()
    assert torch.equal(late, expected)


@pytest.mark.parametrize("name", list(_calls("cpu")))
def test_tensors_of_another_device_run_there(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    operator, tensors = _calls("cuda:1")[name]
    with torch.cuda.device(0):
        result = operator(*tensors)
    assert result.device.index == 1
    torch.testing.assert_close(result.cpu(), operator(*(tensor.to("cuda:0") for tensor in tensors)).cpu())


def test_more_elements_than_32_bits_can_count() -> None:
    rows, cols = 2**17 + 3, 2**14
    if torch.cuda.mem_get_info()[0] < 5 * rows * cols * 2:
        pytest.skip("the GPU has too little memory")
    x = torch.randn(64, cols, device="cuda").bfloat16().repeat(-(-rows // 64), 1)[:rows]
    scale = torch.randn(cols, device="cuda")
    h = kernels.scaled_activation(x, scale, "relu")
    for part in (slice(0, 64), slice(rows - 64, rows)):
        assert_accurate(lambda *args, p=part: h[p], "scaled_activation", x[part], scale, "relu")
    last = x[-64:].clone()
    kernels.scale_weight_(x, scale, 1)
    kernels.scale_weight_(last, scale, 1)
    assert torch.equal(x[-64:], last)
