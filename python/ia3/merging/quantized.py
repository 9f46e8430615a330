"""Vectors in the scales of quantized weights, and out again: where each vector goes, and what its place kept before.

A vector on the output side goes into the scales of its own layer. One on the input side of a gated feed-forward block's
down projection goes into the scales of the up projection, since ``(act(g) ∘ u) ∘ l = act(g) ∘ (l ∘ u)``. Both may be
at work on one layer, merged and unmerged in any order: the product of all is applied to the scales as they were, which
are kept. They are few, so that this costs a fraction of a bit a weight. The codes stay as they are.

Where a vector has no such place, the scaled weight can be quantized anew, with an error, and its codes are kept.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IA3Error
from ..mlp import UpProjection
from ..patching import runs_class_forward
from .formats import Format, State, format_of

# Where a quantized layer keeps what it kept before; on the layer, so that it is copied and pickled with it.
_ATTRIBUTE = "_ia3_scales"


@dataclass(frozen=True)
class Placement:
    """Where the vector of an adapted layer goes.

    owner: the name of that layer.
    path, module: the quantized layer whose weight is scaled, and its name.
    is_input: the vector scales its columns, else its rows.
    start: the first row that it scales.
    requantizes: the weight is quantized anew.
    """

    owner: str
    path: str
    module: nn.Module
    is_input: bool = False
    start: int = 0
    requantizes: bool = False


@dataclass
class _Scales:
    """What merging changed in one quantized layer.

    saved, bias: what it kept before.
    factors: by the names of the layers whose vectors it holds.
    written: what its scales look like since (see :func:`_fingerprint`).
    error: of the weight quantized anew, relative to the exact one.
    """

    saved: State = field(default_factory=dict)
    bias: Tensor | None = None
    factors: dict[str, tuple[Placement, Tensor]] = field(default_factory=dict)
    written: tuple[int, int] = (0, 0)
    error: float | None = None


def find_placement(path: str, layer: Any, up: UpProjection | str | None, requantize: bool) -> Placement:
    """Return where the vectors of ``layer`` go, whose base is quantized.

    up: for a feed-forward layer the up projection that feeds it, or why there is none.
    requantize: quantize anew where there is no exact way.

    Raises :class:`IA3Error`.
    """
    base: nn.Module = layer.base_layer
    kind = type(base).__name__ if type(base) is not nn.Linear else type(base.weight).__name__
    if not runs_class_forward(base):
        raise IA3Error(
            f"cannot merge into {path!r}, a {kind} which has hooks, or a forward of its own; run the model unmerged, "
            "or remove them."
        )
    own = Placement(path, path, base, layer.is_feedforward)
    reason: str | None
    if not layer.is_feedforward:
        placement, reason = own, _obstacle(base)
    elif up is None or isinstance(up, str):
        placement = own
        reason = f"on the input side of which no scales lie: {up or 'it is in no feed-forward block that ia3 knows'}"
    else:
        placement = Placement(path, up.path, getattr(up.module, "base_layer", up.module), start=up.start)
        reason = _obstacle(placement.module)
        if reason is not None:
            reason = f"whose input vector would have to go into {up.path!r}, {reason}"
    if reason is None:
        return placement
    cannot = _format(base).requantize_obstacle(base)
    if cannot is not None:
        why = reason if cannot == reason else f"{reason}, {cannot}"
        raise IA3Error(f"cannot merge into {path!r}, a {kind} {why}; run the model unmerged, or load it unquantized.")
    if not requantize:
        raise IA3Error(
            f"cannot merge into {path!r} exactly, a {kind} {reason}; run the model unmerged, or pass "
            "requantize=True to quantize the scaled weight anew, with an error that is measured and reported."
        )
    return dataclasses.replace(own, requantizes=True)


def _obstacle(layer: nn.Module) -> str | None:
    """Return why the rows of ``layer`` cannot be scaled, as the end of a sentence; ``None`` where they can."""
    known = format_of(layer)
    if known is None:
        return "which is not quantized in a way that ia3 knows"
    if not runs_class_forward(layer):
        return "which has hooks, or a forward of its own"
    return known.obstacle(layer)


def check_unshared(placement: Placement, uses: Counter[Any], address: Callable[[Tensor], Any]) -> None:
    """Raise :class:`IA3Error` where another module uses the weight or the bias that the vector goes into."""
    for parameter in placement.module._parameters.values():
        if parameter is not None and uses[address(parameter)] > 1:
            raise IA3Error(
                f"cannot merge into {placement.owner!r}: other modules use a parameter of the quantized "
                f"{placement.path!r} as well; run the model unmerged, or load it unquantized."
            )


def check_finite(placement: Placement, names: Sequence[str]) -> None:
    """Raise :class:`IA3Error` where what ``placement`` leads to holds scales or a bias that are not finite."""
    scales, bias = _live_scales(placement.module), placement.module._parameters.get("bias")
    if not all(bool(values.isfinite().all()) for values in (scales, bias) if values is not None):
        raise IA3Error(
            f"merging {', '.join(names)} into {placement.owner!r} would give {placement.path!r} a scale or a bias "
            "that is not finite; the adapter is broken, or too large for them: nothing was merged."
        )


@torch.no_grad()
def move(placement: Placement, scale: Tensor | None) -> None:
    """Let what ``placement`` leads to hold ``scale [n]`` for its owner, whatever it kept before; ``None``: nothing.

    Done wholly or, after an exception, not at all.
    """
    layer: Any = placement.module
    before: _Scales | None = layer.__dict__.get(_ATTRIBUTE)
    held = {} if before is None else before.factors
    factors = {owner: factor for owner, factor in held.items() if owner != placement.owner}
    if scale is not None:
        factors[placement.owner] = (placement, scale)
    if before is None and not factors:
        return
    known, bias = _format(layer), layer._parameters.get("bias")
    requantizes = any(placement.requantizes for placement, _ in (*factors.values(), *held.values()))
    now, bias_now = known.read(layer, requantizes), None if bias is None else bias.detach().clone()
    try:
        if before is not None:
            known.write(layer, before.saved)
            if before.bias is not None:
                bias.data.copy_(before.bias)
        if factors:
            layer.__dict__[_ATTRIBUTE] = _scale(layer, factors)
        else:
            del layer.__dict__[_ATTRIBUTE]
    except BaseException:
        known.write(layer, now)
        if bias is not None:
            bias.data.copy_(bias_now)
        raise


def _scale(layer: Any, factors: dict[str, tuple[Placement, Tensor]]) -> _Scales:
    """Scale an unmerged layer; returns what undoes it."""
    known, bias = _format(layer), layer._parameters.get("bias")
    rows, columns = (_product(layer, factors, is_input) for is_input in (False, True))
    requantizes = any(placement.requantizes for placement, _ in factors.values())
    kept = _Scales(known.read(layer, requantizes), factors=factors)
    if requantizes:
        exact = known.values(layer)
        if rows is not None:
            exact.mul_(rows[:, None])
        if columns is not None:
            exact.mul_(known.columns(layer, columns))
        known.write(layer, known.quantize(layer, kept.saved, exact))
        norm = exact.norm()
        kept.error = float(known.values(layer).sub_(exact).norm() / norm) if norm else 0.0
    elif rows is not None:
        known.write(layer, known.scaled(layer, kept.saved, rows))
    if bias is not None and rows is not None:
        kept.bias = bias.detach().clone()
        bias.data.copy_(kept.bias.to(rows.dtype) * rows)
    kept.written = _fingerprint(_live_scales(layer))
    return kept


def _product(layer: Any, factors: dict[str, tuple[Placement, Tensor]], is_input: bool) -> Tensor | None:
    """Return the product of the vectors on one side, ``[out]`` or ``[in]``; ``None`` where there is none."""
    product: Tensor | None = None
    for placement, scale in factors.values():
        if placement.is_input == is_input:
            vector = scale.to(layer._parameters["weight"].device)
            if not is_input and len(vector) < layer.out_features:
                ones = vector.new_ones(layer.out_features)
                ones[placement.start : placement.start + len(vector)] = vector
                vector = ones
            product = vector if product is None else product * vector
    return product


def _format(layer: nn.Module) -> Format:
    known = format_of(layer)
    if known is None:
        raise IA3Error(f"a {type(layer).__name__} took the place of a quantized layer that vectors were merged into.")
    return known


def _live_scales(layer: nn.Module) -> Tensor:
    known = _format(layer)
    return known.scales(known.read(layer))


def _fingerprint(scales: Tensor) -> tuple[int, int]:
    """Return a checksum of the bits of fp32 scales, and of those that they have once rounded to bf16.

    bitsandbytes rounds them when it lays a weight out for some CPUs, which is no reason for an alarm.
    """
    exact = scales.contiguous().cpu()
    return zlib.crc32(exact.numpy().data), zlib.crc32(exact.bfloat16().float().numpy().data)


def check_unwritten(placement: Placement, names: Sequence[str]) -> None:
    """Raise :class:`IA3Error` where the scales were written to since they were merged, and cannot be undone."""
    kept: _Scales | None = placement.module.__dict__.get(_ATTRIBUTE)
    if kept is not None and _fingerprint(_live_scales(placement.module))[0] not in kept.written:
        raise IA3Error(
            f"the scales of {placement.path!r} were written to while {', '.join(names)} was merged into them, so that "
            "merging cannot be undone; load the base model again, and unmerge_adapter before you change weights."
        )


def error_of(placement: Placement) -> float | None:
    """Return the relative error of a weight that was quantized anew; ``None`` where the codes are as they were."""
    kept: _Scales | None = placement.module.__dict__.get(_ATTRIBUTE)
    return None if kept is None else kept.error


def forget(placement: Placement) -> None:
    """Leave the scales as they are, as the layer's own for good."""
    placement.module.__dict__.pop(_ATTRIBUTE, None)
