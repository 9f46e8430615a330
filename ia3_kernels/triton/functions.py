"""Activation functions and their derivatives, and what all kernels share.

They compute in fp32 what csrc/core/elementwise.h computes, with its coefficients. DTYPE is the type that results will
be rounded to: fp32 gets every bit; for 16 bits the hardware's approximate exponential and reciprocal, good to 2^-20,
disappear behind that rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

# Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when Triton was imported).
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
# Threads of a warp
LANES = 64 if torch.version.hip else 32
_LOG2_E: tl.constexpr = tl.constexpr(1.44269504)
_INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.398942280)
_GELU_LINEAR: tl.constexpr = tl.constexpr(1.59576912)  # 2 √(2 / π)
_GELU_CUBIC: tl.constexpr = tl.constexpr(0.0713548163)  # 0.044715 of it


@triton.jit
def exponential(x, DTYPE: tl.constexpr):
    """Compute e^x, saturating. A NaN may come out as a number: the activations are products with x itself."""
    if DTYPE == tl.float32:
        # e^x = 2^n e^r, with r = x - n ln(2) in two steps so that r keeps its low bits, and 2^n in two factors, since
        # it leaves the range of fp32 before e^x does
        x = tl.minimum(173.0, tl.maximum(-173.0, x))
        n = tl.floor(x * _LOG2_E + 0.5)
        r = (x - n * 0.693145752) - n * 1.42860682e-6
        q = (((0.00139411166 * r + 0.00837513246) * r + 0.0416663513) * r + 0.166664153) * r + 0.5
        half = n.to(tl.int32) >> 1
        rest = n.to(tl.int32) - half
        power = (half + 127 << 23).to(tl.float32, bitcast=True)
        return (q * (r * r) + r + 1.0) * power * (rest + 127 << 23).to(tl.float32, bitcast=True)
    elif INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.fast_expf(x)


@triton.jit
def reciprocal(x, DTYPE: tl.constexpr):
    """Compute 1 / x."""
    if DTYPE == tl.float32 or INTERPRETED:
        return 1.0 / x
    else:
        return libdevice.fast_dividef(1.0, x)


@triton.jit
def logistic(x, DTYPE: tl.constexpr):
    """Compute σ(x), and 1 - σ(x) as a product that cancels nothing."""
    # Below -88 e stays finite and σ counts as 0, so that its product with any finite x is -0, as in the limit.
    e = exponential(tl.minimum(88.0, -x), DTYPE)
    d = 1.0 + e
    sigmoid = reciprocal(d, DTYPE)
    if DTYPE == tl.float32:
        # One Newton step takes back what the sum (`lost`, by Knuth's two-sum) and the division rounded away.
        rest = d - 1.0
        lost = (1.0 - (d - rest)) + (e - rest)
        sigmoid += (tl.fma(-d, sigmoid, 1.0) - lost * sigmoid) * sigmoid
    sigmoid = tl.where(x < -88.0, 0.0, sigmoid)
    return sigmoid, e * sigmoid


@triton.jit
def normal(x, DTYPE: tl.constexpr):
    """Compute the standard normal distribution: Φ(x), and exp(-x² / 2), which Φ needs anyway."""
    # Φ(-t) = exp(-t² / 2) y P(y), y = 1 / (1 + 0.33 t), for t >= 0: no cancellation in the lower tail
    gaussian = exponential(x * x * -0.5, DTYPE)
    y = reciprocal(tl.abs(x) * 0.33 + 1.0, DTYPE)
    if DTYPE == tl.bfloat16:
        p = (-0.0552851595 * y + 0.091136232) * y + 0.0886639133
        p = ((p * y + 0.11025732) * y + 0.133751795) * y + 0.131469697
    else:
        p = (-0.00892675482 * y + 0.0248752683) * y + 0.0224733073
        p = ((p * y - 0.142375529) * y + 0.128768519) * y - 0.00937896036
        p = (((p * y + 0.107005723) * y + 0.113927424) * y + 0.131994784) * y + 0.131636232
    tail = gaussian * y * p
    return tl.where(x < 0.0, tail, 1.0 - tail), gaussian


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Compute act(x) and act'(x) from shared parts; where one alone is used, the compiler drops the other's."""
    if ACTIVATION == "silu":
        # x σ(x) ; σ(x) + x σ(x) (1 - σ(x))
        s, rest = logistic(x, DTYPE)
        return x * s, x * s * rest + s
    elif ACTIVATION == "gelu":
        # x Φ(x) ; Φ(x) + x φ(x)
        cdf, gaussian = normal(x, DTYPE)
        return x * cdf, x * _INV_SQRT_2PI * gaussian + cdf
    elif ACTIVATION == "gelu_tanh":
        # x (1 + tanh(z / 2)) / 2 = x σ(z) ; σ(z) + x z' σ(z) (1 - σ(z))
        s, rest = logistic(x * (_GELU_CUBIC * (x * x) + _GELU_LINEAR), DTYPE)
        slope = tl.minimum(1e30, 3.0 * _GELU_CUBIC * (x * x) + _GELU_LINEAR)
        return x * s, x * s * (slope * rest) + s
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)  # a NaN stays one, and its derivative is 1
    elif ACTIVATION == "relu2":
        r = tl.where(x < 0.0, 0.0, x)
        return r * r, 2.0 * r
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def tile_of_program(cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first row (int64) of this program's tile, and its columns ``[BLOCK_N]``.

    Programs that run at the same time lie along the rows, so that together they stream whole pages of memory.
    """
    strips = tl.cdiv(cols, BLOCK_N)
    program = tl.program_id(0)
    return (program // strips).to(tl.int64) * BLOCK_M, program % strips * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def load_scale(scale, adapter, adapters, scale_stride, col, mask):
    """Load rows of a scale ``[adapters, n]`` by adapter, in fp32: ones for -1, NaN for an index that has no row.

    adapter, col and mask broadcast against each other. Nothing outside of the scale is read, whatever the index.
    """
    known = (adapter >= 0) & (adapter < adapters)
    values = tl.load(scale + adapter.to(tl.int64) * scale_stride + col, mask=mask & known, other=1.0).to(tl.float32)
    return tl.where(known | (adapter == -1), values, float("nan"))


@triton.jit
def add_to_sum(total, lost, term, DTYPE: tl.constexpr):
    """Return total + term, and what the sums so far rounded away (Kahan), kept where the terms are fp32."""
    if DTYPE == tl.float32:
        addend = term - lost
        after = total + addend
        return after, (after - total) - addend
    else:
        return total + term, lost


@triton.jit
def sum_chunks(partials, first, last, cols, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add up columns ``col`` ``[1, BLOCK_N]`` of rows first .. last of ``partials [*, cols]``, in their order."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_M):
        chunk = start + tl.arange(0, BLOCK_M)[:, None]
        mask = (chunk < last) & (col < cols)
        total += tl.load(partials + chunk.to(tl.int64) * cols + col, mask=mask, other=0.0)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round fp32 ``x`` to DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter truncates to bf16, and its subnormals are wrong: so round the bits.
        bits = x.to(tl.int32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (rounded >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return x.to(DTYPE)
