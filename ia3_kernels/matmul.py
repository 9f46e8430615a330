"""``scaled_linear`` of the Triton backend: the library's product with a pass over its output, or a Triton kernel.

:func:`ia3_kernels.routes.linear_route` says which. What the CUDA backend does is in ``csrc/torch/cuda.cpp``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import routes, target
from .launches import linear_launch
from .routes import Product, Route
from .schemas import index_of


def library(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """Run ``scaled_linear`` as the library's product and a pass over its output in place, 2 T N b bytes.

    The product is rounded before it is scaled, as the eager formula does; the pass itself rounds once.
    """
    from .triton import activation  # Triton may be missing where other routes run

    if input_scale is not None:
        x = activation.forward(x, None, input_scale, "identity", index_of(input_scale, adapter_index))
    y = torch.nn.functional.linear(x, weight, bias)
    if output_scale is not None:
        activation.forward(y, None, output_scale, "identity", index_of(output_scale, adapter_index), out=y)
    return y


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """Run the operator by the route that was measured to be the fastest for its shape, or asked for by name."""
    indexed = {scale.dim() for scale in (input_scale, output_scale) if scale is not None and adapter_index is not None}
    if (input_scale is not None or output_scale is not None) and len(indexed) < 2:  # the kernel has one index for both
        product = product_of(x, weight, "input" if output_scale is None else "output")
        if _route(x.device.index, product, adapter_index is not None).name == "triton":
            return by_triton(x, weight, bias, input_scale, output_scale, adapter_index)
    return library(x, weight, bias, input_scale, output_scale, adapter_index)


def product_of(x: Tensor, weight: Tensor, side: str) -> Product:
    """Return what the time of a call depends on, with a scale on this side."""
    rows = routes.counted(x.numel() // max(x.shape[-1], 1))
    outputs, inputs = weight.shape
    return Product(side, rows, outputs, inputs, x.element_size(), weight.stride(1) != 1)


# Kept, as it is asked for at each call. The passes beside the library's product are Triton's here and cost the host as
# much as its matmul: the GPU's time decides, captured or not.
@functools.lru_cache(maxsize=4096)
def _route(index: int | None, product: Product, has_adapters: bool) -> Route:
    return routes.linear_route(index, product, ("triton",), is_captured=True, has_adapters=has_adapters)


def forget_choices() -> None:
    """Choose anew from here on."""
    _route.cache_clear()


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

    product = product_of(x, weight, "input" if output_scale is None else "output")
    launch = _route(x.device.index, product, adapter_index is not None).launch
    architecture = target.architecture(x.device.index)
    return linear.matmul(
        x, weight, bias, input_scale, output_scale, adapter_index, architecture=architecture, launch=launch
    )


def describe(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None, available: Sequence[str], is_captured: bool
) -> str:
    """Say which route an output side of ``(rows, out_features, in_features)`` takes, for `ia3_kernels.explain`."""
    if shape is None:
        return f"matmul: {target.gpu_matmul()}, decided by shape"
    index = None if device.type == "cpu" else target.device_index(device)
    rows, outputs, inputs = shape
    product = Product("output", routes.counted(rows), outputs, inputs, dtype.itemsize, False)
    route, captured = (
        routes.linear_route(index, product, available, counts_gpu_only) for counts_gpu_only in (is_captured, True)
    )
    words = f"matmul: {_in_words(index, product, route)}"
    if captured.name != route.name:
        words += f", and inside of a CUDA graph {_in_words(index, product, captured)}"
    return f"{words}; {route.reason}"


def _in_words(index: int | None, product: Product, route: Route) -> str:
    if route.name == "triton":
        architecture, sizes = target.architecture(index), (product.rows, product.outputs, product.inputs)
        return f"Triton, {route.launch or linear_launch(*sizes, product.element_size, architecture, is_aligned=True)}"
    if route.name == "cuda":
        return f"CUDA, tile {route.tile or target.hopper_tiles()[-1]}"
    return "the library, and a pass over the output"
