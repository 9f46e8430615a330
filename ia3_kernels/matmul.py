"""``scaled_linear`` of the Triton backend: the library's product with a pass over its output, or a Triton kernel.

:func:`ia3_kernels.routes.linear_route` says which. What the CUDA backend does is in ``csrc/torch/cuda.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import routes, target
from .launches import linear_launch


class Pass(Protocol):
    """act(gate) ∘ up ∘ scale into ``out``, as the backends' kernels for the activation compute it."""

    def __call__(
        self,
        gate: Tensor,
        up: Tensor | None,
        scale: Tensor | None,
        activation: str,
        adapter_index: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor: ...


def library(
    scale_rows: Pass,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """``scaled_linear`` with the library's product, and a pass over the output in place, 2 T N b bytes.

    The product is rounded before it is scaled, as the eager formula does; the pass itself rounds once.
    """
    if input_scale is not None:
        x = scale_rows(x, None, input_scale, "identity", adapter_index)
    y = torch.nn.functional.linear(x, weight, bias)
    if output_scale is not None:
        scale_rows(y, None, output_scale, "identity", adapter_index, out=y)
    return y


def scaled_linear(
    scale_rows: Pass,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """Run the operator by the route that was measured to be the fastest for its shape, or asked for by name."""
    if input_scale is not None or output_scale is not None:
        route = _route(x, weight)
        if route.name == "triton":
            return by_triton(x, weight, bias, input_scale, output_scale, adapter_index)
    return library(scale_rows, x, weight, bias, input_scale, output_scale, adapter_index)


def by_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    adapter_index: Tensor | None,
) -> Tensor:
    """Run the operator in the Triton kernel, with the launch that was measured for its shape."""
    from .triton import linear  # Triton may be missing where other routes run

    # Measured with an output scale alone; the others need registers and shared memory for more.
    launch = _route(x, weight).launch if input_scale is None and adapter_index is None else None
    architecture = target.architecture(x.device.index)
    return linear.matmul(
        x, weight, bias, input_scale, output_scale, adapter_index, architecture=architecture, launch=launch
    )


def _route(x: Tensor, weight: Tensor) -> routes.Route:
    rows, (outputs, inputs) = x.numel() // max(x.shape[-1], 1), weight.shape
    return routes.linear_route(x.device.index, rows, outputs, inputs, x.dtype, weight.stride(1) != 1)


def describe(device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None) -> str:
    """The route of ``(rows, out_features, in_features)`` in words, for :func:`ia3_kernels.explain`."""
    if shape is None:
        return f"matmul: {target.gpu_matmul()}, decided by shape"
    index = None if device.type == "cpu" else target.device_index(device)
    rows, outputs, inputs = shape
    route = routes.linear_route(index, rows, outputs, inputs, dtype, False)
    if route.name == "triton":
        launch = route.launch or linear_launch(
            rows, outputs, inputs, dtype.itemsize, target.architecture(index), is_aligned=True
        )
        return f"matmul: Triton, {launch}; {route.reason}"
    if route.name == "cuda":
        return f"matmul: CUDA, tile {route.tile}; {route.reason}"
    return f"matmul: the library, and a pass over the output; {route.reason}"
