"""What an eager call costs on the host: operators and layers on tensors so small that kernels take next to nothing.

A GPU computes while the host prepares the next kernel, so on large tensors this cost hides behind the kernels; on small
ones, and wherever an operator replaces a few fast kernels by one, it is what a step takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

import ia3_kernels

from .. import eager, llama
from ..measure import interleave
from ..records import Recorder
from ..settings import DTYPES, Settings

ROWS, WIDTH = 8, 64
_BASELINES = {"ours": ("eager", "linear", "peft", "frozen_base"), "eager": ("linear",), "peft": ("frozen_base",)}
_Function = Callable[..., Tensor]


def run(settings: Settings, recorder: Recorder) -> None:
    """Measures each in each dtype: without gradients, with a graph recorded, and with its backward."""
    torch.manual_seed(0)
    for dtype in settings.dtypes:
        measured = _operators(settings.device, DTYPES[dtype]) | _layers(settings, dtype)
        for name, (functions, leaves) in measured.items():
            for mode, times in _times(settings, functions, leaves).items():
                recorder.add_times("host", f"{name}, {mode}, {ROWS}x{WIDTH}", dtype, times, _BASELINES)
            recorder.save()


def _operators(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[dict[str, _Function], list[Tensor]]]:
    """For each operator its implementations, and the tensors that it differentiates; frozen weights stand between."""
    x, gate, up = (torch.randn(ROWS, WIDTH, device=device).to(dtype) for _ in range(3))
    weights = [(torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5).to(dtype) for _ in range(3)]
    weight = weights[0]
    scale = 1 + 0.2 * torch.randn(WIDTH, device=device)
    plain = {"linear": lambda x, *_: F.linear(x, weight)}

    def linear(function: _Function, side: str) -> _Function:
        return lambda x, s: function(x, weight, **{f"{side}_scale": s})

    def eager_mlp(x: Tensor, s: Tensor) -> Tensor:
        hidden = eager.gated_activation(F.linear(x, weights[0]), F.linear(x, weights[1]), s)
        return F.linear(hidden, weights[2])

    return {
        **{
            f"scaled_linear {side} side": (
                {
                    "ours": linear(ia3_kernels.scaled_linear, side),
                    "eager": linear(eager.scaled_linear, side),
                    **plain,
                },
                [x, scale],
            )
            for side in ("output", "input")
        },
        "gated_activation": (
            {"ours": ia3_kernels.gated_activation, "eager": eager.gated_activation, **plain},
            [gate, up, scale],
        ),
        "scaled_activation": (
            {"ours": ia3_kernels.scaled_activation, "eager": eager.scaled_activation, **plain},
            [x, scale],
        ),
        "gated_mlp": (
            {"ours": lambda x, s: ia3_kernels.gated_mlp(x, *weights, s), "eager": eager_mlp, **plain},
            [x, scale],
        ),
    }


def _layers(settings: Settings, dtype: str) -> dict[str, tuple[dict[str, _Function], list[Tensor]]]:
    """A Llama's key projection and feed-forward block, as modules that are called, with and without a vector."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=WIDTH,
    )
    models = llama.models(settings, dtype, ("ours", "peft", "frozen_base"), config)
    x = torch.randn(ROWS, WIDTH, device=settings.device).to(DTYPES[dtype])
    found: dict[str, tuple[dict[str, _Function], list[Tensor]]] = {}
    for name, path in (("k_proj, called", "self_attn.k_proj"), ("mlp, called", "mlp")):
        modules = {
            impl: next(module for place, module in model.named_modules() if place.endswith(f"layers.0.{path}"))
            for impl, model in models.items()
        }
        found[name] = (dict(modules), [x])
    return found


def _times(
    settings: Settings, functions: dict[str, _Function], tensors: list[Tensor]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of one call of each function, by what is done around it."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    grad = torch.ones_like(tensors[0])

    def forward(function: _Function, calls: int) -> None:
        with torch.no_grad():
            for _ in range(calls):
                function(*tensors)

    def recorded(function: _Function, calls: int) -> None:
        for _ in range(calls):
            function(*leaves)

    def both(function: _Function, calls: int) -> None:
        for _ in range(calls):
            torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)

    found = {}
    # So many calls that a round takes some 5 to 20 ms, and the whole suite half a minute of a GPU's time
    for mode, call, calls in (
        ("no gradient", forward, 200),
        ("recorded", recorded, 200),
        ("forward and backward", both, 50),
    ):
        calls = 20 if settings.quick else calls
        fns = {impl: partial(call, function, calls) for impl, function in functions.items()}
        times = interleave(fns, settings.rounds(15), warmup=3, device=settings.device)
        found[mode] = {impl: [value / calls for value in values] for impl, values in times.items()}
    return found
