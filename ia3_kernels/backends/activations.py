"""The operators of activations around a backend's two functions, which have checked arguments and both kinds in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..schemas import check_activation


def operators(
    forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> Mapping[str, Callable[..., object]]:
    """The four operators by name.

    forward(gate, up, scale, activation, adapter_index) and backward(grad, gate, up, scale, activation, adapter_index,
    wants) are called with ``up`` None for those that are not gated.
    """

    def gated_activation(
        gate: Tensor,
        up: Tensor,
        scale: Tensor | None = None,
        activation: str = "silu",
        adapter_index: Tensor | None = None,
    ) -> Tensor:
        check_activation("gated_activation", gate, up, scale, activation, adapter_index)
        return forward(gate, up, scale, activation, adapter_index)

    def scaled_activation(
        x: Tensor, scale: Tensor | None = None, activation: str = "silu", adapter_index: Tensor | None = None
    ) -> Tensor:
        check_activation("scaled_activation", x, None, scale, activation, adapter_index)
        return forward(x, None, scale, activation, adapter_index)

    def gated_activation_backward(
        grad: Tensor,
        gate: Tensor,
        up: Tensor,
        scale: Tensor | None,
        activation: str,
        adapter_index: Tensor | None,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_activation("gated_activation", gate, up, scale, activation, adapter_index)
        return backward(grad, gate, up, scale, activation, adapter_index, output_mask)

    def scaled_activation_backward(
        grad: Tensor,
        x: Tensor,
        scale: Tensor | None,
        activation: str,
        adapter_index: Tensor | None,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        check_activation("scaled_activation", x, None, scale, activation, adapter_index)
        wants_x, wants_scale = output_mask
        wants = (wants_x, False, wants_scale)
        grad_x, _, grad_scale = backward(grad, x, None, scale, activation, adapter_index, wants)
        return grad_x, grad_scale

    found = (gated_activation, scaled_activation, gated_activation_backward, scaled_activation_backward)
    return {function.__name__: function for function in found}
