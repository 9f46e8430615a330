"""Gradients and autocast of the operators where there is no native library: what ``csrc/torch`` registers, in Python.

Every backward calls ``ia3::`` operators and keeps only what ``needs_input_grad`` asks for. Gradients are first-order:
differentiating twice raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import target
from .formulas import cast
from .reference import flat
from .schemas import LIBRARY, index_of, refuse_tangents

ops: Any = torch.ops.ia3


def _first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a `Function.backward` whose gradients say that they are first-order when they are differentiated again.

    Torch's `once_differentiable` says so only where the gradient that comes in requires one.
    """
    words = (
        f"{op}: second-order gradients are not implemented; compute first-order gradients, or run the formula in plain "
        "torch where you differentiate twice."
    )

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, grad: Tensor) -> Any:
            with torch.no_grad(), torch._C._DisableAutocast():
                gradients = backward(ctx, grad)
            if not torch.is_grad_enabled():
                return gradients
            fail = torch._C._functions.DelayedError(words.encode(), 1)
            return tuple(None if g is None else fail(g.detach().requires_grad_()) for g in gradients)

        return wrapper

    return decorate


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        output_scale: Tensor | None,
        adapter_index: Tensor | None,
    ) -> Tensor:
        needs_x, needs_weight, _, needs_input_scale, needs_output_scale, _ = ctx.needs_input_grad
        product = None
        y: Tensor
        if needs_output_scale:
            # ds_out = Σ dy ∘ z, so the product z = (x ∘ s_in) Wᵀ + b is kept
            y, product = ops.scaled_linear_product(x, weight, bias, input_scale, output_scale, adapter_index)
        else:
            y = ops.scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)
        ctx.save_for_backward(
            x if needs_weight or needs_input_scale else None,
            weight if needs_x or needs_input_scale else None,
            input_scale,
            output_scale,
            adapter_index,
            product,
        )
        return y

    @staticmethod
    @_first_order("scaled_linear")
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, input_scale, output_scale, adapter_index, product = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_input_scale, needs_output_scale, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_input_scale = grad_output_scale = None
        needs_product = needs_x or needs_weight or needs_bias or needs_input_scale

        # y = z ∘ s_out :  dz = dy ∘ s_out ; ds_out = Σ dy ∘ z
        if needs_output_scale:
            dz, grad_output_scale = ops.scaled_activation_backward(
                grad, product, output_scale, "identity", index_of(output_scale, adapter_index), [needs_product, True]
            )
        elif output_scale is not None and needs_product:
            dz = ops.scaled_activation(grad, output_scale, "identity", index_of(output_scale, adapter_index))
        else:
            dz = grad

        # z = (x ∘ s_in) Wᵀ + b :  d(x ∘ s_in) = dz W
        input_index = index_of(input_scale, adapter_index)
        if needs_input_scale:
            scaled = ops.scaled_linear(dz, weight.t())
            grad_x, grad_input_scale = ops.scaled_activation_backward(
                scaled, x, input_scale, "identity", input_index, [needs_x, True]
            )
            grad_x = grad_x if needs_x else None
        elif needs_x:
            # The input scale is the output scale of the transposed product: dx = (dz W) ∘ s_in
            grad_x = ops.scaled_linear(dz, weight.t(), None, None, input_scale, input_index)
        if needs_weight:
            rows = x if input_scale is None else ops.scaled_activation(x, input_scale, "identity", input_index)
            grad_weight = flat(dz).t() @ flat(rows)
        if needs_bias:
            grad_bias = flat(dz).sum(0)
        return grad_x, grad_weight, grad_bias, grad_input_scale, grad_output_scale, None


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, scale: Tensor | None, activation: str, adapter_index: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gate, up, scale, adapter_index)
        ctx.activation = activation
        h: Tensor = ops.gated_activation(gate, up, scale, activation, adapter_index)
        return h

    @staticmethod
    @_first_order("gated_activation")
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up, scale, adapter_index = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        gradients = ops.gated_activation_backward(grad, gate, up, scale, ctx.activation, adapter_index, mask)
        return (*(g if wanted else None for g, wanted in zip(gradients, mask, strict=True)), None, None)


class _ScaledActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, activation: str, adapter_index: Tensor | None) -> Tensor:
        # With no nonlinearity, x matters only to the gradient of the scale.
        keeps_x = activation != "identity" or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if keeps_x else None, scale, adapter_index)
        ctx.activation = activation
        h: Tensor = ops.scaled_activation(x, scale, activation, adapter_index)
        return h

    @staticmethod
    @_first_order("scaled_activation")
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, adapter_index = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:2])
        if x is None:
            return ops.scaled_activation(grad, scale, "identity", adapter_index), None, None, None
        gradients = ops.scaled_activation_backward(grad, x, scale, ctx.activation, adapter_index, mask)
        return (*(g if wanted else None for g, wanted in zip(gradients, mask, strict=True)), None, None)


# --- blocks: of these operators, with their gradients --------------------------------------------------------------


def _gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    scale: Tensor | None = None,
    activation: str = "silu",
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    gate, up = ops.scaled_linear(x, gate_weight, None, gate_scale), ops.scaled_linear(x, up_weight, None, up_scale)
    y: Tensor = ops.scaled_linear(ops.gated_activation(gate, up, scale, activation), down_weight)
    return y


def _mlp(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    scale: Tensor | None = None,
    activation: str = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    hidden = ops.scaled_activation(ops.scaled_linear(x, up_weight, up_bias), scale, activation)
    y: Tensor = ops.scaled_linear(hidden, down_weight, down_bias)
    return y


# --- registration ------------------------------------------------------------------------------------------------


def _register_autograd(op: str, function: type[torch.autograd.Function], defaults: tuple[object, ...]) -> None:
    operator = getattr(ops, op)

    def kernel(*args: Any) -> Any:
        # The dispatcher leaves trailing defaults out; autograd.Function wants them all.
        args = args + defaults[len(args) :]
        refuse_tangents(op, *args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    LIBRARY.impl(op, kernel, "Autograd")


def _register_autocast(device_type: str, key: str) -> None:
    def scaled_linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        output_scale: Tensor | None = None,
        adapter_index: Tensor | None = None,
    ) -> Tensor:
        # As for `linear`: the matmul's operands take autocast's dtype. Scales keep theirs; arithmetic on them is fp32.
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, bias = cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            y: Tensor = ops.scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)
            return y

    LIBRARY.impl("scaled_linear", scaled_linear, key)


def _register_all() -> None:
    _register_autograd("scaled_linear", _ScaledLinear, (None,) * 6)
    _register_autograd("gated_activation", _GatedActivation, (None, None, None, "silu", None))
    _register_autograd("scaled_activation", _ScaledActivation, (None, None, "silu", None))
    _register_autocast("cpu", "AutocastCPU")
    _register_autocast("cuda", "AutocastCUDA")
    for key in ("Autograd", "CompositeExplicitAutograd"):
        LIBRARY.impl("gated_mlp", _gated_mlp, key)
        LIBRARY.impl("mlp", _mlp, key)


if not isinstance(target.native_library(), ModuleType):
    _register_all()
