"""Activation functions and their derivatives in fp32, and what all kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when Triton was imported).
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)
_GELU_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def sigmoid_with_derivative(x):
    """σ(x) and σ'(x) = σ(x) σ(-x), with no cancellation in 1 - σ(x), which would cost half of the digits."""
    t = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + t)
    return tl.where(x < 0.0, t * r, r), t * r * r


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x)."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = 1 / (1 + exp(-2 z))
        return x / (1.0 + tl.exp(-2.0 * _SQRT_2_OVER_PI * (x + _GELU_CUBIC * x * x * x)))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    elif ACTIVATION == "relu2":
        r = tl.where(x < 0.0, 0.0, x)
        return r * r
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x


@triton.jit
def activate_with_derivative(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x)."""
    if ACTIVATION == "silu":
        s, ds = sigmoid_with_derivative(x)
        return x * s, s + x * ds
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        return x * cdf, cdf + x * _INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        s, ds = sigmoid_with_derivative(2.0 * _SQRT_2_OVER_PI * (x + _GELU_CUBIC * x * x * x))
        dz = 2.0 * _SQRT_2_OVER_PI * (1.0 + 3.0 * _GELU_CUBIC * x * x)
        return x * s, s + x * dz * ds
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        r = tl.where(x < 0.0, 0.0, x)
        return r * r, 2.0 * r
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def load_scale(scale, adapter, adapters, scale_stride, col, mask):
    """Rows of a scale ``[adapters, n]`` by their adapters, in fp32: ones for -1, NaN for an index that has no row.

    adapter ``[M, 1]``, col and mask broadcast against it. Nothing outside of the scale is read, whatever the index.
    """
    known = (adapter >= 0) & (adapter < adapters)
    values = tl.load(scale + adapter.to(tl.int64) * scale_stride + col, mask=mask & known, other=1.0).to(tl.float32)
    return tl.where(known | (adapter == -1), values, float("nan"))


@triton.jit
def sum_chunks(partials, first, last, cols, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns ``col`` ``[1, BLOCK_N]`` of rows first .. last of ``partials [*, cols]``, added up in their order."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_M):
        chunk = start + tl.arange(0, BLOCK_M)[:, None]
        mask = (chunk < last) & (col < cols)
        total += tl.load(partials + chunk.to(tl.int64) * cols + col, mask=mask, other=0.0)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 ``x`` in DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter truncates to bf16, so round here, in the upper half of the bits: truncating is exact then.
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(DTYPE)
    else:
        return x.to(DTYPE)
