"""The compiled CUDA kernels of ``csrc/cuda`` on tensors: checked arguments in, the current stream of their device.

Equations, bytes and flops stand above each kernel in its source. ``IA3_CUDA`` in CMakeLists.txt says where they are
built; :func:`ia3_kernels.target.cuda_problem` says why they cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import target
from .chunks import chunks_by_adapter
from .schemas import check_scale_weight_
from .tuning import activation_launch


def _kernels() -> Any:
    library = target.native_library()
    assert isinstance(library, ModuleType)  # target.cuda_problem() was asked before
    return library.cuda


def _stream(x: Tensor) -> int:
    return int(torch._C._cuda_getCurrentRawStream(x.device.index))


def forward(
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    activation: str,
    adapter_index: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """act(gate) ∘ up ∘ scale, with or without ``up``; into ``out`` where given, which may be ``gate`` itself."""
    result: Tensor = _kernels().activation(gate, up, scale, activation, adapter_index, out, _stream(gate))
    return result


def backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    activation: str,
    adapter_index: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate, up and scale; an empty tensor for one that is not wanted."""
    chunks = None
    if adapter_index is not None and scale is not None and gate.numel():
        index = adapter_index.reshape(-1)
        launch = activation_launch(index.numel(), gate.shape[-1], gate.element_size(), is_backward=True)
        order, *rest = chunks_by_adapter(index, scale.shape[0], launch.CHUNK)
        chunks = [order.to(torch.int32), *rest]
    result: tuple[Tensor, Tensor, Tensor] = _kernels().activation_backward(
        grad, gate, up, scale, activation, chunks, list(wants), _stream(gate)
    )
    return result


def scale_weight_(weight: Tensor, scale: Tensor, dim: int) -> None:
    check_scale_weight_(weight, scale, dim)
    if 1 not in weight.stride() and weight.numel():  # a strided slice, which no layer stores
        scaled = weight.contiguous()
        scale_weight_(scaled, scale, dim)
        weight.copy_(scaled)
        return
    _kernels().scale_weight_(weight, scale, dim, _stream(weight))


def hopper_tiles() -> list[str]:
    """The names of the tiles that the Hopper matmul was built with."""
    names: list[str] = _kernels().hopper_tiles()
    return names


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    adapter_index: Tensor | None,
    tile: str = "auto",
) -> Tensor | None:
    """``scaled_linear`` with the product in our kernels, x ``[*, K]`` → ``[*, N]``; None where none of them takes it.

    Up to 16 rows stream the weight once; more run on Hopper's tensor cores, ``tile`` being one of its tiles.
    """
    kernels, stream = _kernels(), _stream(x)
    outputs = kernels.small_linear(x, [weight], [bias], input_scale, [output_scale], adapter_index, stream)
    if outputs is not None:
        return outputs[0]  # type: ignore[no-any-return]
    if adapter_index is not None and output_scale is not None:
        return None
    if input_scale is not None:
        x = forward(x, None, input_scale, "identity", adapter_index)
    result: Tensor | None = kernels.hopper_linear(x, weight, bias, output_scale, tile, stream)
    return result


def small_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    input_scale: Tensor | None,
    output_scales: Sequence[Tensor | None],
    adapter_index: Tensor | None,
) -> list[Tensor] | None:
    """Up to four layers of one input, such as k and v, in one launch; None for more than 16 rows."""
    result: list[Tensor] | None = _kernels().small_linear(
        x, list(weights), list(biases), input_scale, list(output_scales), adapter_index, _stream(x)
    )
    return result
