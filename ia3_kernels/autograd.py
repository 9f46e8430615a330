"""Gradients and autocast of the operators. What each operator keeps for backward is tabulated in docs/architecture.md.

Every backward calls ``ia3::`` operators and keeps only what ``needs_input_grad`` asks for. Gradients are first-order:
differentiating twice raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .schemas import LIBRARY, check_scale_weight_

ops: Any = torch.ops.ia3


def _run(op: str, first: Tensor, *args: Any) -> Any:
    """An operator below autograd. Where nothing listens in between, past the dispatcher, whose ways through Python cost
    more than a small kernel."""
    if (
        type(first) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(first)
    ):
        return backends.run(op, first, *args)
    return getattr(ops, op)(first, *args)


class _SecondOrder(torch.autograd.Function):
    """Stands behind first-order gradients that were asked for with ``create_graph=True``, and raises if used."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: second-order gradients are not implemented; "
            "compute first-order gradients, or run the formula in plain torch where you differentiate twice."
        )


def _first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a `Function.backward` that computes first-order gradients and says so when differentiated again."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, grad: Tensor) -> Any:
            with torch.no_grad():
                gradients = backward(ctx, grad)
            if not torch.is_grad_enabled():
                return gradients
            # create_graph=True: tie each gradient to all it was computed from, so that a second derivative gets here.
            sources = [t for t in (grad, *ctx.saved_tensors) if t is not None and t.requires_grad]
            return tuple(None if g is None else _SecondOrder.apply(op, g, *sources) for g in gradients)

        return wrapper

    return decorate


def _can_look_at(tensor: Tensor) -> bool:
    """Whether the host may read the tensor's values now: a real CPU tensor outside of tracing."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


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
        saved = None
        ctx.saved_is_output = False
        y: Tensor
        if output_scale is None or not needs_output_scale:
            y = _run("scaled_linear", x, weight, bias, input_scale, output_scale, adapter_index)
        elif _output_recovers_product(x, weight, output_scale, adapter_index):
            y = saved = _run("scaled_linear", x, weight, bias, input_scale, output_scale, adapter_index)
            ctx.saved_is_output = True
        else:
            # z = (x ∘ s_in) Wᵀ + b is kept; y = z ∘ s_out
            saved = _run(
                "scaled_linear", x, weight, bias, input_scale, None, None if input_scale is None else adapter_index
            )
            y = _run("scaled_activation", saved, output_scale, "identity", adapter_index)
        ctx.save_for_backward(
            x if needs_weight or needs_input_scale else None,
            weight if needs_x or needs_input_scale else None,
            input_scale,
            output_scale,
            adapter_index,
            saved,
        )
        return y

    @staticmethod
    @_first_order("scaled_linear")
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, input_scale, output_scale, adapter_index, saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_input_scale, needs_output_scale, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_input_scale = grad_output_scale = None
        needs_product = needs_x or needs_weight or needs_bias or needs_input_scale

        # y = z ∘ s_out :  dz = dy ∘ s_out ; ds_out = Σ dy ∘ z
        if needs_output_scale:
            dz, grad_output_scale = _run(
                "scaled_activation_backward",
                grad,
                saved,
                output_scale,
                "identity",
                adapter_index,
                [needs_product, True],
            )
            if ctx.saved_is_output:
                # Σ dy ∘ z = (Σ dy ∘ y) / s_out, and no entry of s_out is near zero
                grad_output_scale = grad_output_scale / output_scale
        elif output_scale is not None and needs_product:
            dz = _run("scaled_activation", grad, output_scale, "identity", adapter_index)
        else:
            dz = grad

        # z = (x ∘ s_in) Wᵀ + b :  d(x ∘ s_in) = dz W
        if needs_input_scale:
            product = _run("scaled_linear", dz, weight.t())
            grad_x, grad_input_scale = _run(
                "scaled_activation_backward", product, x, input_scale, "identity", adapter_index, [needs_x, True]
            )
            grad_x = grad_x if needs_x else None
        elif needs_x:
            # The input scale is the output scale of the transposed product: dx = (dz W) ∘ s_in
            grad_x = _run(
                "scaled_linear", dz, weight.t(), None, None, input_scale, None if input_scale is None else adapter_index
            )
        if needs_weight:
            rows = x if input_scale is None else _run("scaled_activation", x, input_scale, "identity", adapter_index)
            grad_weight = dz.reshape(-1, dz.shape[-1]).t() @ rows.reshape(-1, rows.shape[-1])
        if needs_bias:
            grad_bias = dz.reshape(-1, dz.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias, grad_input_scale, grad_output_scale, None


def _output_recovers_product(x: Tensor, weight: Tensor, output_scale: Tensor, adapter_index: Tensor | None) -> bool:
    """Whether keeping the output alone gives exact gradients. Decided from the scale's values, so only where the host
    may read them; elsewhere the unscaled product is kept."""
    if adapter_index is not None or not (_can_look_at(x) and _can_look_at(output_scale)):
        return False
    backend, _ = backends.choose("scaled_linear", x.device.type, x.dtype)
    return backend.recovers_product(x, weight, output_scale)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, scale: Tensor | None, activation: str, adapter_index: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gate, up, scale, adapter_index)
        ctx.activation = activation
        h: Tensor = _run("gated_activation", gate, up, scale, activation, adapter_index)
        return h

    @staticmethod
    @_first_order("gated_activation")
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up, scale, adapter_index = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        gradients = _run("gated_activation_backward", grad, gate, up, scale, ctx.activation, adapter_index, mask)
        return (*(g if wanted else None for g, wanted in zip(gradients, mask, strict=True)), None, None)


class _ScaledActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, activation: str, adapter_index: Tensor | None) -> Tensor:
        # With no nonlinearity, x matters only to the gradient of the scale.
        keeps_x = activation != "identity" or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if keeps_x else None, scale, adapter_index)
        ctx.activation = activation
        h: Tensor = _run("scaled_activation", x, scale, activation, adapter_index)
        return h

    @staticmethod
    @_first_order("scaled_activation")
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, adapter_index = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:2])
        if x is None:
            return _run("scaled_activation", grad, scale, "identity", adapter_index), None, None, None
        gradients = _run("scaled_activation_backward", grad, x, scale, ctx.activation, adapter_index, mask)
        return (*(g if wanted else None for g, wanted in zip(gradients, mask, strict=True)), None, None)


# --- registration ------------------------------------------------------------------------------------------------


def _register_autograd(op: str, function: type[torch.autograd.Function], defaults: tuple[object, ...]) -> None:
    operator = getattr(ops, op)

    def kernel(*args: Any) -> Any:
        # The dispatcher leaves trailing defaults out; autograd.Function wants them all.
        args = args + defaults[len(args) :]
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    LIBRARY.impl(op, kernel, "Autograd")


_register_autograd("scaled_linear", _ScaledLinear, (None,) * 6)
_register_autograd("gated_activation", _GatedActivation, (None, None, None, "silu", None))
_register_autograd("scaled_activation", _ScaledActivation, (None, None, "silu", None))


def _register_in_place(op: str) -> None:
    """An operator that writes over its first argument: not differentiable, and autograd is told of the write."""
    operator = getattr(ops, op)

    def kernel(weight: Tensor, *args: Any) -> Any:
        if op == "scale_weight_":
            check_scale_weight_(weight, *args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in (weight, *args)):
            raise RuntimeError(
                f"{op}: weight or scale requires grad, and an in-place scaling is not differentiable; "
                "call it under torch.no_grad()."
            )
        with torch._C._AutoDispatchBelowAutograd():
            result = operator(weight, *args)
        torch.autograd.graph.increment_version(weight)
        return result

    LIBRARY.impl(op, kernel, "Autograd")


for _op in ("scale_weight_", "merge_exact_", "unmerge_exact_", "swap_exact_"):
    _register_in_place(_op)


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

        def cast(tensor: Tensor | None) -> Tensor | None:
            eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(dtype) if eligible and tensor is not None else tensor

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            y: Tensor = ops.scaled_linear(cast(x), cast(weight), cast(bias), input_scale, output_scale, adapter_index)
            return y

    LIBRARY.impl("scaled_linear", scaled_linear, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
