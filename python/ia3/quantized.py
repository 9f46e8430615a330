"""Gradients through packed layers whose own ``forward`` loses them, or wastes memory on them.

transformers' GGUF layers are made for inference: up to eight rows they call a kernel that has no backward, and with
more rows autograd keeps every unpacked weight until backward. bitsandbytes' 4-bit layers turn their weight, at the
first evaluation on a CPU with AVX-512 BF16, into a layout whose kernel has no backward. Either way a gradient is lost
with no more than a warning. Where a gradient is asked for, the functions here unpack the weight again in backward.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import forwards

# Parts of a frozen weight [out, in] as plain values, with the rows that each is.
_Parts = Iterator[tuple[slice, Tensor]]
_Run = Callable[[Tensor], Tensor]
_Unpack = Callable[[torch.dtype], _Parts]


class _FrozenProduct(torch.autograd.Function):
    """``run(x)``, which computes ``x @ W.T + b``; ``unpack`` gives the parts of ``W`` in a dtype. Keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: _Run, unpack: _Unpack) -> Tensor:
        ctx.unpack = unpack
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        parts = (dy[..., rows] @ values for rows, values in ctx.unpack(dy.dtype))
        return functools.reduce(torch.add, parts), None, None


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def gguf_forward(layer: Any, x: Tensor) -> Tensor:
    """The output ``[*, out]`` of a ``GgufLinear`` for x ``[*, in]``, with a gradient for x."""
    if not _wants_gradient(x):
        own: Tensor = type(layer).forward(layer, x)
        return own
    if layer.input_permutation is not None:
        x = x.index_select(-1, layer.input_permutation)
    unpack = functools.partial(_gguf_parts, layer)

    def run(x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], layer.out_features)
        for rows, values in unpack(x.dtype):
            y[..., rows] = x @ values.T
        return y

    y: Tensor = _FrozenProduct.apply(x, run, unpack)
    return y if layer.bias is None else (y + layer.bias).to(x.dtype)


def _gguf_parts(layer: Any, dtype: torch.dtype) -> _Parts:
    # Here, because transformers imports its quantizers lazily, and a model with packed layers has done so.
    from transformers.integrations.gguf.kernels import DEQUANT_CHUNK_ELEMS, dequantize_blocks

    step = max(1, DEQUANT_CHUNK_ELEMS // layer.in_features)
    for start in range(0, layer.out_features, step):
        packed = layer.weight[start : start + step]
        values = dequantize_blocks(packed, layer.ggml_type, packed.shape[0], layer.in_features, dtype)
        yield slice(start, start + step), values


def bnb_4bit_forward(layer: Any, x: Tensor) -> Tensor:
    """The output ``[*, out]`` of a ``Linear4bit`` for x ``[*, in]``, with a gradient for x in either layout."""
    run = functools.partial(type(layer).forward, layer)
    if not (_wants_gradient(x) and getattr(layer.weight.quant_state, "packing_format_for_cpu", False)):
        own: Tensor = run(x)
        return own
    y: Tensor = _FrozenProduct.apply(x, run, functools.partial(_bnb_4bit_parts, layer))
    return y


def _bnb_4bit_parts(layer: Any, dtype: torch.dtype) -> _Parts:
    from bitsandbytes import functional

    state = copy.copy(layer.weight.quant_state)
    # The inverse would quantize the blocks' scales anew, each time a little differently: keep them as they are.
    state.original_nested = False
    packed, state = functional._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    values = functional.dequantize_4bit(packed.view(torch.uint8), state)
    yield slice(None), values.to(dtype)


# By name, because the layers come with optional packages.
_FORWARDS: dict[str, forwards.Forward] = {"GgufLinear": gguf_forward, "Linear4bit": bnb_4bit_forward}


def make_differentiable(model: nn.Module) -> None:
    """Give every such layer of ``model`` its function from here, on the instance, where it can be taken back."""
    for layer in model.modules():
        if "ia3_l" in layer._modules:  # PEFT's layer around one, of the same name
            continue
        function = next((_FORWARDS[kind.__name__] for kind in type(layer).__mro__ if kind.__name__ in _FORWARDS), None)
        if function is not None:
            forwards.replace(layer, function)


def restore(model: nn.Module) -> None:
    """Take back what :func:`make_differentiable` did."""
    for layer in model.modules():
        forwards.restore(layer, _FORWARDS.values())
