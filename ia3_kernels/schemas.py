"""The operators' contract: schemas, argument checks and fake implementations.

Everything a backend must agree on stands here, before any backend. Shapes: ``K`` = in_features, ``N`` = out_features,
``I`` = intermediate size, ``A`` = adapters, ``*`` = any batch shape. Scales are ``[n]`` (one adapter), or ``[A, n]``
with an int32 ``adapter_index`` of shape ``[*]``, in which ``-1`` selects no adapter (a scale of ones). Beside one that
is indexed, a vector scales every row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

LIBRARY = torch.library.Library("ia3", "DEF")

SCHEMAS = {
    "scaled_linear": "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? input_scale=None, "
    "Tensor? output_scale=None, Tensor? adapter_index=None) -> Tensor",
    "gated_activation": '(Tensor gate, Tensor up, Tensor? scale=None, str activation="silu", '
    "Tensor? adapter_index=None) -> Tensor",
    "scaled_activation": '(Tensor x, Tensor? scale=None, str activation="silu", Tensor? adapter_index=None) -> Tensor',
    # A feed-forward block of frozen weights: act(x Wgᵀ) ∘ (x Wuᵀ) ∘ s through Wd, or act(x Wuᵀ + b) ∘ s through Wd + c.
    # gate_scale, up_scale [H]: what the block's input is multiplied by on its way into gate and up.
    "gated_mlp": "(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, Tensor? scale=None, "
    'str activation="silu", Tensor? gate_scale=None, Tensor? up_scale=None) -> Tensor',
    "mlp": '(Tensor x, Tensor up_weight, Tensor down_weight, Tensor? scale=None, str activation="gelu", '
    "Tensor? up_bias=None, Tensor? down_bias=None) -> Tensor",
    "scale_weight_": "(Tensor(a!) weight, Tensor scale, int dim) -> ()",
    # Scaling that can be undone. The weight is a matrix as it lies in memory, [rows, cols] with adjacent columns, and
    # the scale is [rows] (dim 0) or [groups, cols] (dim 1: each group of rows has its own). Results: parity, and the
    # positions and bits of escapes (see exact.py); of stays_finite, one bool.
    "merge_exact_": "(Tensor(a!) weight, Tensor scale, int dim) -> (Tensor, Tensor, Tensor)",
    "unmerge_exact_": "(Tensor(a!) weight, Tensor scale, int dim, Tensor parity, Tensor positions, Tensor bits) -> ()",
    "swap_exact_": "(Tensor(a!) weight, Tensor old_scale, Tensor new_scale, int dim, Tensor(b!) parity, "
    "Tensor positions, Tensor bits) -> (Tensor, Tensor)",
    "stays_finite": "(Tensor weight, Tensor scale, int dim) -> Tensor",
    # What gradients are computed with. scaled_linear and its product before output_scale; x ∘ first and x ∘ second.
    "scaled_linear_product": "(Tensor x, Tensor weight, Tensor? bias, Tensor? input_scale, Tensor output_scale, "
    "Tensor? adapter_index) -> (Tensor, Tensor)",
    "scale_pair": "(Tensor x, Tensor first, Tensor second) -> (Tensor, Tensor)",
    # Backward passes. A result whose `output_mask` entry is False comes back as an empty tensor.
    "gated_activation_backward": "(Tensor grad, Tensor gate, Tensor up, Tensor? scale, str activation, "
    "Tensor? adapter_index, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    "scaled_activation_backward": "(Tensor grad, Tensor x, Tensor? scale, str activation, "
    "Tensor? adapter_index, bool[2] output_mask) -> (Tensor, Tensor)",
    "scale_pair_backward": "(Tensor grad_first, Tensor grad_second, Tensor x, Tensor first, Tensor second, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
}

DIFFERENTIABLE = ("scaled_linear", "gated_activation", "scaled_activation", "gated_mlp", "mlp")
# Merging that can be undone; registered in Python, since milliseconds of work hide what that costs.
EXACT = ("merge_exact_", "unmerge_exact_", "swap_exact_", "stays_finite")
# What csrc/torch registers, with its gradients, where there is a native library.
COMPILED = tuple(name for name in SCHEMAS if name not in EXACT)

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# --- argument checks ---------------------------------------------------------------------------------------------
#
# The sentences of every way of a call. The native library asks its own short questions (csrc/torch/checks.cpp), and
# comes here for the words; without it, and for traced shapes, these functions do both.


def _check(condition: bool, sentence: Callable[[], str]) -> None:
    """Raise RuntimeError with the sentence unless the condition holds: ``torch._check`` cannot be traced with words."""
    if not condition:
        raise RuntimeError(sentence())


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_given(op: str, name: str, tensor: object) -> None:
    """Raise a sentence unless an argument is a tensor."""
    _check(isinstance(tensor, Tensor), lambda: f"{op}: {name} is of type {type(tensor).__name__}; expected a tensor.")


def _check_dtype(op: str, name: str, tensor: Tensor) -> None:
    check_given(op, name, tensor)
    _check(
        tensor.dtype in DTYPES,
        lambda: f"{op}: {name} has dtype {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}.",
    )


def _check_same(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    check_given(op, name, tensor)
    _check(
        tensor.dtype == like.dtype,
        lambda: f"{op}: {name} has dtype {tensor.dtype}, but {like_name} has {like.dtype}; convert one of them.",
    )
    _check(
        tensor.device == like.device,
        lambda: f"{op}: {name} is on {tensor.device}, but {like_name} is on {like.device}; move one of them.",
    )


def _check_activation(op: str, activation: str) -> None:
    _check(
        activation in ACTIVATIONS,
        lambda: f"{op}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}.",
    )


def _is_vector(scale: Tensor) -> bool:
    """Return whether a scale is one of ``[n]``, or as PEFT stores it of ``[n, 1]`` or ``[1, n]``."""
    return scale.dim() == 1 or (scale.dim() == 2 and 1 in scale.shape and scale.is_contiguous())


def _check_scale(op: str, name: str, scale: Tensor | None, size: int, x: Tensor, adapter_index: Tensor | None) -> None:
    if scale is None:
        return
    _check(scale.is_floating_point(), lambda: f"{op}: {name} has dtype {scale.dtype}; expected a floating-point dtype.")
    _check(
        scale.device == x.device,
        lambda: f"{op}: {name} is on {scale.device}, but the input is on {x.device}; move one of them.",
    )
    if adapter_index is None:
        _check(
            _is_vector(scale) and scale.numel() == size,
            lambda: (
                f"{op}: {name} has shape {_shape(scale)}; expected [{size}] "
                "(a two-dimensional scale also needs adapter_index)."
            ),
        )
    else:
        _check(
            scale.dim() in (1, 2) and scale.shape[-1] == size,
            lambda: (
                f"{op}: {name} has shape {_shape(scale)}; expected [adapters, {size}] because adapter_index is given."
            ),
        )


def _check_index(op: str, adapter_index: Tensor | None, x: Tensor, scales: Sequence[Tensor | None]) -> None:
    if adapter_index is None:
        return
    _check(
        any(scale is not None and scale.dim() == 2 for scale in scales),
        lambda: f"{op}: adapter_index is given, but no scale to index; expected one of shape [adapters, n].",
    )
    _check(
        adapter_index.dtype == torch.int32,
        lambda: f"{op}: adapter_index has dtype {adapter_index.dtype}; expected torch.int32.",
    )
    _check(
        adapter_index.shape == x.shape[:-1],
        lambda: (
            f"{op}: adapter_index has shape {_shape(adapter_index)}; expected the input's batch shape {_shape(x)[:-1]}."
        ),
    )
    _check(
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
    check_given(op, "weight", weight)
    _check(weight.dim() == 2, lambda: f"{op}: weight has shape {_shape(weight)}; expected [out, in].")
    _check_same(op, "weight", weight, "x", x)
    _check(
        x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"{op}: x has shape {_shape(x)}, but weight has in_features {weight.shape[1]}; "
            "expected them to be equal to x's last dimension."
        ),
    )
    if bias is not None:
        _check(
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
    _check(x.dim() >= 1, lambda: f"{op}: {name} has no dimensions; expected at least one.")
    _check_activation(op, activation)
    if op.startswith("gated"):
        check_given(op, "up", up)
    if up is not None:
        _check(
            up.shape == x.shape,
            lambda: f"{op}: up has shape {_shape(up)}, but gate has {_shape(x)}; expected equal shapes.",
        )
        _check_same(op, "up", up, "gate", x)
    _check_scale(op, "scale", scale, x.shape[-1], x, adapter_index)
    _check_index(op, adapter_index, x, (scale,))


def check_gradient(op: str, grad: Tensor, result: Tensor) -> None:
    """Raise a sentence unless a gradient is of its result's shape, dtype and device."""
    _check(
        grad.shape == result.shape,
        lambda: f"{op}: the gradient has shape {_shape(grad)}; expected the result's, {_shape(result)}.",
    )
    _check_same(op, "the gradient", grad, "the result", result)


def check_bounds(adapter_index: Tensor, adapters: int) -> None:
    """Raise IndexError for an index on the CPU that names no row of ``[adapters, n]`` and is not -1."""
    if adapter_index.device.type != "cpu" or not adapter_index.numel():
        return
    low, high = int(adapter_index.min()), int(adapter_index.max())
    if low < -1 or high >= adapters:
        raise IndexError(
            f"adapter_index holds {low if low < -1 else high}; expected -1 (no adapter) to {adapters - 1}, "
            f"since the scale has {adapters} rows."
        )


def check_scale_pair(x: Tensor, first: Tensor, second: Tensor) -> None:
    """Raise a sentence unless the arguments of ``scale_pair`` fit together."""
    op = "scale_pair"
    _check_dtype(op, "x", x)
    _check(x.dim() >= 1, lambda: f"{op}: x has no dimensions; expected at least one.")
    for name, scale in (("first", first), ("second", second)):
        check_given(op, name, scale)
        _check_scale(op, name, scale, x.shape[-1], x, None)


def block_error(
    error: RuntimeError,
    op: str,
    x: Tensor,
    layers: Mapping[str, tuple[Tensor | None, str]],
    scales: Mapping[str, tuple[Tensor | None, str]],
) -> RuntimeError:
    """Return what is wrong with a feed-forward block's arguments in its own words, or the error if it is not that.

    The operators that a block is made of name their own. layers: weights and biases, with the letters of their shapes,
    of which the first that has one says its size; scales likewise. x is ``[*, H]``.
    """
    try:
        _check_dtype(op, "x", x)
        sizes = {"H": x.shape[-1]} if x.dim() else {}
        for name, (tensor, letters) in layers.items():
            if tensor is None:
                continue
            _check_same(op, name, tensor, "x", x)
            shape = _shape(tensor)
            expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            own = zip(letters, shape, strict=False)
            if len(shape) != len(letters) or any(sizes.setdefault(letter, size) != size for letter, size in own):
                return RuntimeError(f"{op}: {name} has shape {shape}; expected [{expected}].")
        for name, (scale, letter) in scales.items():
            _check_scale(op, name, scale, sizes[letter], x, None)
    except RuntimeError as found:
        return found
    return error


def check_out(op: str, out: Tensor, like: Tensor, *others: Tensor | None) -> None:
    """Raise a sentence unless a result can be written into ``out``, computed from ``like`` and others."""
    for name, tensor in (("out", out), ("the input", like)):
        check_given(op, name, tensor)
    refuse_tangents(op, out, like, *others)
    _check(
        out.shape == like.shape and out.dtype == like.dtype and out.device == like.device and out.is_contiguous(),
        lambda: (
            f"{op}: out is {out.dtype} of shape {_shape(out)} and strides {list(out.stride())} on {out.device}; "
            f"expected a contiguous {like.dtype} of shape {_shape(like)} on {like.device}."
        ),
    )
    _check(
        not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in (out, like, *others)),
        lambda: f"{op}: out is given where a gradient is recorded; call it under torch.no_grad(), or without out.",
    )


def check_scale_weight_(weight: Tensor, scale: Tensor, dim: int) -> None:
    """Raise a sentence unless the arguments of ``scale_weight_`` fit together."""
    op = "scale_weight_"
    check_dim(op, weight, dim)
    _check(weight.dim() == 2, lambda: f"{op}: weight has shape {_shape(weight)}; expected [out, in].")
    check_weight_scale(op, "scale", scale, weight, dim)


def check_dim(op: str, weight: Tensor, dim: int) -> None:
    """Raise a sentence unless a weight is of a known dtype and can be scaled along ``dim``."""
    _check_dtype(op, "weight", weight)
    _check(dim in (0, 1), lambda: f"{op}: dim is {dim}; expected 0 (scale the outputs) or 1 (the inputs).")
    _check(
        weight.dim() > dim,
        lambda: (
            f"{op}: weight has shape {_shape(weight)} and dim is {dim}; expected [out] (dim 0), [out, in] or a "
            "convolution's."
        ),
    )


def check_weight_scale(op: str, name: str, scale: Tensor, weight: Tensor, dim: int, groups: int = 1) -> None:
    """Raise a sentence unless a scale is a vector of what a weight has along ``dim``, in each of its groups."""
    size = weight.shape[dim]
    check_given(op, name, scale)
    _check(scale.is_floating_point(), lambda: f"{op}: {name} has dtype {scale.dtype}; expected a floating-point dtype.")
    _check(
        scale.device == weight.device,
        lambda: f"{op}: {name} is on {scale.device}, but weight is on {weight.device}; move one of them.",
    )
    _check(
        _is_vector(scale) and scale.numel() == groups * size and groups > 0 and weight.shape[0] % groups == 0,
        lambda: f"{op}: {name} has shape {_shape(scale)}; expected [{size}], for a weight {_shape(weight)}.",
    )


def refuse_tangents(op: str, *args: object) -> None:
    """Raise a sentence where forward-mode differentiation asks for a derivative that it would not get."""
    if forward_ad._current_level < 0:
        return
    for arg in args:
        _check(
            not isinstance(arg, Tensor) or forward_ad.unpack_dual(arg).tangent is None,
            lambda: (
                f"{op}: forward-mode derivatives (jvp, jacfwd, dual numbers) are not implemented; differentiate "
                "backward, or run the formula in plain torch where you need them."
            ),
        )


def index_of(scale: Tensor | None, adapter_index: Tensor | None) -> Tensor | None:
    """Return the index of a scale ``[A, n]``; None for a vector, which every row shares."""
    return None if scale is None or scale.dim() == 1 else adapter_index


def pattern_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the integer dtype that holds a weight's bit pattern."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def parity_shape(weight: Tensor) -> tuple[int, int]:
    """Return the shape of the lowest bits of ``weight [rows, cols]``, eight to a byte."""
    return weight.shape[0], (weight.shape[1] + 7) // 8


def _check_exact_scale(op: str, name: str, weight: Tensor, scale: Tensor, dim: int) -> None:
    groups = scale.shape[0] if dim == 1 and scale.dim() == 2 else 1
    _check(
        scale.dim() == 1 + dim,
        lambda: f"{op}: {name} has shape {_shape(scale)}; expected {('[rows]', '[groups, cols]')[dim]}.",
    )
    check_weight_scale(op, name, scale.reshape(-1), weight, dim, groups)


def check_exact(op: str, weight: Tensor, dim: int, **scales: Tensor) -> None:
    """Raise a sentence unless the arguments of an exact scaling fit together."""
    _check_dtype(op, "weight", weight)
    _check(weight.dim() == 2, lambda: f"{op}: weight has shape {_shape(weight)}; expected [rows, cols].")
    _check(
        weight.numel() == 0 or weight.shape[1] == 1 or weight.stride(1) == 1,
        lambda: (
            f"{op}: weight has strides {list(weight.stride())}; expected adjacent columns, so that rows are what lies "
            "together in memory."
        ),
    )
    check_dim(op, weight, dim)
    for name, scale in scales.items():
        _check_exact_scale(op, name, weight, scale, dim)


def check_residual(op: str, weight: Tensor, parity: Tensor, positions: Tensor, bits: Tensor) -> None:
    """Raise a sentence unless a residual's shapes and dtypes are those of the weight's."""
    # Small weights are merged by the hundred, so that nothing is made here for sentences that nobody reads.
    shape, pattern, device = parity_shape(weight), pattern_dtype(weight.dtype), weight.device
    if parity.dtype != torch.uint8 or parity.shape != shape:
        raise RuntimeError(
            f"{op}: parity is {parity.dtype} of shape {_shape(parity)}; expected uint8 {list(shape)}, contiguous."
        )
    for name, tensor in (("parity", parity), ("positions", positions), ("bits", bits)):
        if tensor.device != device or not tensor.is_contiguous():
            raise RuntimeError(
                f"{op}: {name} is on {tensor.device} with strides {list(tensor.stride())}; "
                f"expected a contiguous tensor on the weight's device, {device}."
            )
    if positions.dtype != torch.int64 or bits.dtype != pattern or bits.shape != positions.shape:
        raise RuntimeError(
            f"{op}: positions and bits are {positions.dtype} and {bits.dtype} of shapes {_shape(positions)} and "
            f"{_shape(bits)}; expected int64 and {pattern} of one length."
        )


def check_arguments(op: str, *args: Any) -> None:
    """Raise a sentence unless the positional arguments of an operator's kernel fit together.

    For kernels that Python registers: the native library checks its own.
    """
    match op, args:
        case "scaled_linear" | "scaled_linear_product", [x, weight, *rest]:
            bias, input_scale, output_scale, adapter_index = _filled(rest, None, None, None, None)
            check_scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index)
        case "gated_activation", [gate, up, *rest]:
            scale, activation, adapter_index = _filled(rest, None, "silu", None)
            check_activation(op, gate, up, scale, activation, adapter_index)
        case "scaled_activation", [x, *rest]:
            scale, activation, adapter_index = _filled(rest, None, "silu", None)
            check_activation(op, x, None, scale, activation, adapter_index)
        case "gated_activation_backward", [grad, gate, up, scale, activation, adapter_index, _]:
            check_activation("gated_activation", gate, up, scale, activation, adapter_index)
            check_gradient("gated_activation", grad, gate)
        case "scaled_activation_backward", [grad, x, scale, activation, adapter_index, _]:
            check_activation("scaled_activation", x, None, scale, activation, adapter_index)
            check_gradient("scaled_activation", grad, x)
        case "scale_pair", [x, first, second]:
            check_scale_pair(x, first, second)
        case "scale_pair_backward", [grad_first, grad_second, x, first, second, _]:
            check_scale_pair(x, first, second)
            check_gradient("scale_pair", grad_first, x)
            check_gradient("scale_pair", grad_second, x)
        case "scale_weight_", [weight, scale, dim]:
            check_scale_weight_(weight, scale, dim)
        case "merge_exact_" | "stays_finite", [weight, scale, dim]:
            check_exact(op, weight, dim, scale=scale)
        case "unmerge_exact_", [weight, scale, dim, *residual]:
            check_exact(op, weight, dim, scale=scale)
            check_residual(op, weight, *residual)
        case "swap_exact_", [weight, old_scale, new_scale, dim, *residual]:
            check_exact(op, weight, dim, old_scale=old_scale, new_scale=new_scale)
            _check(
                old_scale.shape == new_scale.shape,
                lambda: (
                    f"{op}: old_scale has shape {_shape(old_scale)}, but new_scale has {_shape(new_scale)}; expected "
                    "equal shapes."
                ),
            )
            check_residual(op, weight, *residual)


def _filled(given: Sequence[Any], *defaults: Any) -> Sequence[Any]:
    """Return the arguments with the defaults of those that the dispatcher left out."""
    return (*given, *defaults[len(given) :])


# --- fake implementations ----------------------------------------------------------------------------------------


def _empty(like: Tensor, wanted: bool = True) -> Tensor:
    return like.new_empty(like.shape if wanted else 0)


def _escapes(weight: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    bits = weight.new_empty(count, dtype=pattern_dtype(weight.dtype))
    return weight.new_empty(count, dtype=torch.int64), bits


def _fake(op: str, *args: Any) -> Any:
    """Return an operator's results without values, of arguments that fit together."""
    check_arguments(op, *args)
    match op, args:
        case "scaled_linear" | "scaled_linear_product", [x, weight, *_]:
            y = x.new_empty((*x.shape[:-1], weight.shape[0]))
            return y if op == "scaled_linear" else (y, torch.empty_like(y))
        case "gated_mlp", [x, gate_weight, up_weight, down_weight, *rest]:
            scale, activation, gate_scale, up_scale = _filled(rest, None, "silu", None, None)
            gate = _fake("scaled_linear", x, gate_weight, None, gate_scale)
            up = _fake("scaled_linear", x, up_weight, None, up_scale)
            return _fake("scaled_linear", _fake("gated_activation", gate, up, scale, activation), down_weight)
        case "mlp", [x, up_weight, down_weight, *rest]:
            scale, activation, up_bias, down_bias = _filled(rest, None, "gelu", None, None)
            up = _fake("scaled_linear", x, up_weight, up_bias)
            return _fake("scaled_linear", _fake("scaled_activation", up, scale, activation), down_weight, down_bias)
        case "gated_activation" | "scaled_activation", [x, *_]:
            return _empty(x)
        case "gated_activation_backward", [_, gate, up, scale, _, _, mask]:
            sums = _empty(gate, False) if scale is None else _empty(scale, mask[2])
            return _empty(gate, mask[0]), _empty(up, mask[1]), sums
        case "scaled_activation_backward", [_, x, scale, _, _, mask]:
            return _empty(x, mask[0]), _empty(x, False) if scale is None else _empty(scale, mask[1])
        case "scale_pair", [x, *_]:
            return _empty(x), _empty(x)
        case "scale_pair_backward", [_, _, *inputs, mask]:
            return tuple(map(_empty, inputs, mask))
        case "merge_exact_", [weight, *_]:
            return weight.new_empty(parity_shape(weight), dtype=torch.uint8), *_escapes(weight)
        case "swap_exact_", [weight, *_]:
            return _escapes(weight)
        case "stays_finite", [weight, *_]:
            return weight.new_empty((), dtype=torch.bool)
    return None  # scale_weight_, unmerge_exact_


for _name in SCHEMAS:
    torch.library.register_fake(f"ia3::{_name}", functools.partial(_fake, _name), lib=LIBRARY)
