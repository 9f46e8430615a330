"""The operators' contract: schemas, argument checks and fake implementations.

Everything a backend must agree on stands here, before any backend. Shapes: ``K`` = in_features, ``N`` = out_features,
``I`` = intermediate size, ``A`` = adapters, ``*`` = any batch shape. Scales are ``[n]`` (one adapter), or ``[A, n]``
with an int32 ``adapter_index`` of shape ``[*]``, in which ``-1`` selects no adapter (a scale of ones).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

LIBRARY = torch.library.Library("ia3", "DEF")

SCHEMAS = {
    "scaled_linear": "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? input_scale=None, "
    "Tensor? output_scale=None, Tensor? adapter_index=None) -> Tensor",
    "gated_activation": '(Tensor gate, Tensor up, Tensor? scale=None, str activation="silu", '
    "Tensor? adapter_index=None) -> Tensor",
    "scaled_activation": '(Tensor x, Tensor? scale=None, str activation="silu", Tensor? adapter_index=None) -> Tensor',
    "scale_weight_": "(Tensor(a!) weight, Tensor scale, int dim) -> ()",
    # Scaling that can be undone. The weight is a matrix as it lies in memory, [rows, cols] with adjacent columns, and
    # the scale is [rows] (dim 0) or [groups, cols] (dim 1: each group of rows has its own). Results: parity, and the
    # positions and bits of escapes (see exact.py); of stays_finite, one bool.
    "merge_exact_": "(Tensor(a!) weight, Tensor scale, int dim) -> (Tensor, Tensor, Tensor)",
    "unmerge_exact_": "(Tensor(a!) weight, Tensor scale, int dim, Tensor parity, Tensor positions, Tensor bits) -> ()",
    "swap_exact_": "(Tensor(a!) weight, Tensor old_scale, Tensor new_scale, int dim, Tensor(b!) parity, "
    "Tensor positions, Tensor bits) -> (Tensor, Tensor)",
    "stays_finite": "(Tensor weight, Tensor scale, int dim) -> Tensor",
    # Backward passes. A result whose `output_mask` entry is False comes back as an empty tensor.
    "gated_activation_backward": "(Tensor grad, Tensor gate, Tensor up, Tensor? scale, str activation, "
    "Tensor? adapter_index, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    "scaled_activation_backward": "(Tensor grad, Tensor x, Tensor? scale, str activation, "
    "Tensor? adapter_index, bool[2] output_mask) -> (Tensor, Tensor)",
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# --- argument checks ---------------------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_dtype(op: str, name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dtype in DTYPES,
        lambda: f"{op}: {name} has dtype {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}.",
    )


def _check_same(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    torch._check(
        tensor.dtype == like.dtype,
        lambda: f"{op}: {name} has dtype {tensor.dtype}, but {like_name} has {like.dtype}; convert one of them.",
    )
    torch._check(
        tensor.device == like.device,
        lambda: f"{op}: {name} is on {tensor.device}, but {like_name} is on {like.device}; move one of them.",
    )


def _check_activation(op: str, activation: str) -> None:
    torch._check(
        activation in ACTIVATIONS,
        lambda: f"{op}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}.",
    )


def _check_scale(op: str, name: str, scale: Tensor | None, size: int, x: Tensor, adapter_index: Tensor | None) -> None:
    if scale is None:
        return
    torch._check(
        scale.is_floating_point(), lambda: f"{op}: {name} has dtype {scale.dtype}; expected a floating-point dtype."
    )
    torch._check(
        scale.device == x.device,
        lambda: f"{op}: {name} is on {scale.device}, but the input is on {x.device}; move one of them.",
    )
    if adapter_index is None:
        torch._check(
            scale.dim() == 1 and scale.shape[0] == size,
            lambda: (
                f"{op}: {name} has shape {_shape(scale)}; expected [{size}] "
                "(a two-dimensional scale also needs adapter_index)."
            ),
        )
    else:
        torch._check(
            scale.dim() == 2 and scale.shape[1] == size,
            lambda: (
                f"{op}: {name} has shape {_shape(scale)}; expected [adapters, {size}] because adapter_index is given."
            ),
        )


def _check_index(op: str, adapter_index: Tensor | None, x: Tensor, scales: Sequence[Tensor | None]) -> None:
    if adapter_index is None:
        return
    torch._check(
        any(scale is not None for scale in scales), lambda: f"{op}: adapter_index is given, but no scale to index."
    )
    torch._check(
        adapter_index.dtype == torch.int32,
        lambda: f"{op}: adapter_index has dtype {adapter_index.dtype}; expected torch.int32.",
    )
    torch._check(
        adapter_index.shape == x.shape[:-1],
        lambda: (
            f"{op}: adapter_index has shape {_shape(adapter_index)}; expected the input's batch shape {_shape(x)[:-1]}."
        ),
    )
    torch._check(
        adapter_index.device == x.device,
        lambda: f"{op}: adapter_index is on {adapter_index.device}, but the input is on {x.device}; move one of them.",
    )


def check_scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    adapter_index: Tensor | None,
) -> None:
    """Raise a sentence unless the arguments of ``scaled_linear`` fit together."""
    op = "scaled_linear"
    _check_dtype(op, "x", x)
    torch._check(weight.dim() == 2, lambda: f"{op}: weight has shape {_shape(weight)}; expected [out, in].")
    _check_same(op, "weight", weight, "x", x)
    torch._check(
        x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"{op}: x has shape {_shape(x)}, but weight has in_features {weight.shape[1]}; "
            "expected them to be equal to x's last dimension."
        ),
    )
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            lambda: f"{op}: bias has shape {_shape(bias)}; expected [{weight.shape[0]}].",
        )
        _check_same(op, "bias", bias, "x", x)
    _check_scale(op, "input_scale", input_scale, weight.shape[1], x, adapter_index)
    _check_scale(op, "output_scale", output_scale, weight.shape[0], x, adapter_index)
    _check_index(op, adapter_index, x, (input_scale, output_scale))


def check_activation(
    op: str, x: Tensor, up: Tensor | None, scale: Tensor | None, activation: str, adapter_index: Tensor | None
) -> None:
    """Raise a sentence unless the arguments of ``gated_activation`` or ``scaled_activation`` fit together."""
    name = "x" if up is None else "gate"
    _check_dtype(op, name, x)
    torch._check(x.dim() >= 1, lambda: f"{op}: {name} has no dimensions; expected at least one.")
    _check_activation(op, activation)
    if up is not None:
        torch._check(
            up.shape == x.shape, lambda: f"{op}: up has shape {_shape(up)}, but gate has {_shape(x)}; expected equals."
        )
        _check_same(op, "up", up, "gate", x)
    _check_scale(op, "scale", scale, x.shape[-1], x, adapter_index)
    _check_index(op, adapter_index, x, (scale,))


def check_scale_weight_(weight: Tensor, scale: Tensor, dim: int) -> None:
    """Raise a sentence unless the arguments of ``scale_weight_`` fit together."""
    op = "scale_weight_"
    _check_dtype(op, "weight", weight)
    torch._check(weight.dim() == 2, lambda: f"{op}: weight has shape {_shape(weight)}; expected [out, in].")
    torch._check(dim in (0, 1), lambda: f"{op}: dim is {dim}; expected 0 (scale the rows) or 1 (scale the columns).")
    _check_scale(op, "scale", scale, weight.shape[dim], weight, None)


def pattern_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype that holds a weight's bit pattern."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def parity_shape(weight: Tensor) -> tuple[int, int]:
    """The shape of the lowest bits of ``weight [rows, cols]``, eight to a byte."""
    return weight.shape[0], (weight.shape[1] + 7) // 8


def _check_exact_scale(op: str, name: str, weight: Tensor, scale: Tensor, dim: int) -> None:
    rows, cols = weight.shape
    torch._check(
        scale.is_floating_point(), lambda: f"{op}: {name} has dtype {scale.dtype}; expected a floating-point dtype."
    )
    torch._check(
        scale.device == weight.device,
        lambda: f"{op}: {name} is on {scale.device}, but the weight is on {weight.device}; move one of them.",
    )
    if dim == 0:
        torch._check(
            scale.dim() == 1 and scale.shape[0] == rows,
            lambda: f"{op}: {name} has shape {_shape(scale)}; expected [{rows}].",
        )
    else:
        torch._check(
            scale.dim() == 2 and scale.shape[1] == cols and scale.shape[0] > 0 and rows % scale.shape[0] == 0,
            lambda: (
                f"{op}: {name} has shape {_shape(scale)}; expected [groups, {cols}], with groups that divide {rows}."
            ),
        )


def check_exact(op: str, weight: Tensor, dim: int, **scales: Tensor) -> None:
    """Raise a sentence unless the arguments of an exact scaling fit together."""
    _check_dtype(op, "weight", weight)
    torch._check(weight.dim() == 2, lambda: f"{op}: weight has shape {_shape(weight)}; expected [rows, cols].")
    torch._check(
        weight.numel() == 0 or weight.shape[1] == 1 or weight.stride(1) == 1,
        lambda: (
            f"{op}: weight has strides {list(weight.stride())}; expected adjacent columns, so that rows are what lies "
            "together in memory."
        ),
    )
    torch._check(dim in (0, 1), lambda: f"{op}: dim is {dim}; expected 0 (scale the rows) or 1 (the columns).")
    for name, scale in scales.items():
        _check_exact_scale(op, name, weight, scale, dim)


def check_residual(op: str, weight: Tensor, parity: Tensor, positions: Tensor, bits: Tensor) -> None:
    """Raise a sentence unless a residual's shapes and dtypes are those of the weight's."""
    shape = parity_shape(weight)
    torch._check(
        parity.dtype == torch.uint8 and tuple(parity.shape) == shape,
        lambda: f"{op}: parity is {parity.dtype} of shape {_shape(parity)}; expected uint8 {list(shape)}, contiguous.",
    )
    pattern = pattern_dtype(weight.dtype)
    torch._check(
        positions.dtype == torch.int64 and bits.dtype == pattern and bits.shape == positions.shape,
        lambda: (
            f"{op}: positions and bits are {positions.dtype} and {bits.dtype} of shapes {_shape(positions)} and "
            f"{_shape(bits)}; expected int64 and {pattern} of one length."
        ),
    )


# --- fake implementations ----------------------------------------------------------------------------------------


def _empty(like: Tensor, wanted: bool) -> Tensor:
    return like.new_empty(like.shape if wanted else 0)


def _empty_scale_gradient(x: Tensor, scale: Tensor | None, wanted: bool) -> Tensor:
    return x.new_empty(0) if scale is None else _empty(scale, wanted)


@torch.library.register_fake("ia3::scaled_linear", lib=LIBRARY)
def _scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    check_scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("ia3::gated_activation", lib=LIBRARY)
def _gated_activation(
    gate: Tensor,
    up: Tensor,
    scale: Tensor | None = None,
    activation: str = "silu",
    adapter_index: Tensor | None = None,
) -> Tensor:
    check_activation("gated_activation", gate, up, scale, activation, adapter_index)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("ia3::scaled_activation", lib=LIBRARY)
def _scaled_activation(
    x: Tensor, scale: Tensor | None = None, activation: str = "silu", adapter_index: Tensor | None = None
) -> Tensor:
    check_activation("scaled_activation", x, None, scale, activation, adapter_index)
    return x.new_empty(x.shape)


@torch.library.register_fake("ia3::scale_weight_", lib=LIBRARY)
def _scale_weight_(weight: Tensor, scale: Tensor, dim: int) -> None:
    check_scale_weight_(weight, scale, dim)


def _unknown_escapes(weight: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    bits = weight.new_empty(count, dtype=pattern_dtype(weight.dtype))
    return weight.new_empty(count, dtype=torch.int64), bits


@torch.library.register_fake("ia3::merge_exact_", lib=LIBRARY)
def _merge_exact_(weight: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    check_exact("merge_exact_", weight, dim, scale=scale)
    return weight.new_empty(parity_shape(weight), dtype=torch.uint8), *_unknown_escapes(weight)


@torch.library.register_fake("ia3::unmerge_exact_", lib=LIBRARY)
def _unmerge_exact_(weight: Tensor, scale: Tensor, dim: int, parity: Tensor, positions: Tensor, bits: Tensor) -> None:
    check_exact("unmerge_exact_", weight, dim, scale=scale)
    check_residual("unmerge_exact_", weight, parity, positions, bits)


@torch.library.register_fake("ia3::swap_exact_", lib=LIBRARY)
def _swap_exact_(
    weight: Tensor, old_scale: Tensor, new_scale: Tensor, dim: int, parity: Tensor, positions: Tensor, bits: Tensor
) -> tuple[Tensor, Tensor]:
    check_exact("swap_exact_", weight, dim, old_scale=old_scale, new_scale=new_scale)
    check_residual("swap_exact_", weight, parity, positions, bits)
    return _unknown_escapes(weight)


@torch.library.register_fake("ia3::stays_finite", lib=LIBRARY)
def _stays_finite(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
    check_exact("stays_finite", weight, dim, scale=scale)
    return weight.new_empty((), dtype=torch.bool)


@torch.library.register_fake("ia3::gated_activation_backward", lib=LIBRARY)
def _gated_activation_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    scale: Tensor | None,
    activation: str,
    adapter_index: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    check_activation("gated_activation", gate, up, scale, activation, adapter_index)
    wants_gate, wants_up, wants_scale = output_mask
    return _empty(gate, wants_gate), _empty(up, wants_up), _empty_scale_gradient(gate, scale, wants_scale)


@torch.library.register_fake("ia3::scaled_activation_backward", lib=LIBRARY)
def _scaled_activation_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    activation: str,
    adapter_index: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    check_activation("scaled_activation", x, None, scale, activation, adapter_index)
    wants_x, wants_scale = output_mask
    return _empty(x, wants_x), _empty_scale_gradient(x, scale, wants_scale)
