"""What the parameters of one layer hold, and how they get from one vector to another, in place and bit-exactly.

Each function here changes a layer wholly or, after an exception, not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ia3_kernels import Residual, merge_, swap_, unmerge_

from ..errors import IA3Error
from ..experts import ExpertsMatrix
from . import quantized
from .quantized import Placement


@dataclass
class MergedParameter:
    """What one parameter holds.

    residual: what undoes it. A parameter that others share has none: it was replaced by a scaled copy, and is kept as
        ``original``.
    written: which tensor it was and how often it had been written to, afterwards.
    """

    residual: Residual | None
    original: nn.Parameter | None
    written: tuple[int, int | None]


@dataclass
class MergeState:
    """What a merged layer holds: the adapters' names, the product of their vectors, and how to undo it.

    The product is kept because vectors change, and a weight must be divided by what it was multiplied with. Of a
    quantized layer, ``placement`` says which scales hold it, and there are no ``parameters``.
    """

    names: list[str]
    scale: Tensor
    parameters: dict[str, MergedParameter]
    is_exact: bool = True
    placement: Placement | None = None

    @property
    def shared(self) -> set[str]:
        """Return the names of parameters that others use as well."""
        return {name for name, state in self.parameters.items() if state.original is not None}


def scaled_parameters(layer: Any) -> Iterator[tuple[str, int]]:
    """Return the names of the parameters that a layer's vectors scale, and along which dimension: 0, the outputs; 1."""
    base = layer.base_layer
    yield "weight", base.dim if isinstance(base, ExpertsMatrix) else int(layer.is_feedforward)
    if not layer.is_feedforward and base._parameters.get("bias") is not None:
        yield "bias", 0


def as_stored(base: nn.Module, parameter: Tensor) -> Tensor:
    """Return a view of a parameter with outputs first: ``Conv1D`` stores its weight the other way round."""
    if isinstance(base, ExpertsMatrix):
        return base.as_stored(parameter)
    return parameter.detach().t() if isinstance(base, Conv1D) and parameter.dim() == 2 else parameter.detach()


def _written(parameter: Tensor) -> tuple[int, int | None]:
    return id(parameter), None if parameter.is_inference() else parameter._version


def check_unwritten(path: str, layer: Any) -> None:
    """Raise :class:`IA3Error` where a merged layer cannot be unmerged any more."""
    state: MergeState | None = layer._merge_state
    if state is None or layer._is_suspended:
        return
    if state.placement is not None:
        quantized.check_unwritten(state.placement, state.names)
        return
    if not state.is_exact:
        raise IA3Error(
            f"{', '.join(state.names)} was merged into {path!r} with exact=False, which keeps nothing to undo it with; "
            "load the base model again, or merge with exact=True."
        )
    for name, parameter in state.parameters.items():
        now = _written(layer.base_layer._parameters[name])
        # Another object is a copy of the layer, which brought its residual along.
        if parameter.residual is not None and now[0] == parameter.written[0] and now[1] != parameter.written[1]:
            raise IA3Error(
                f"the {name} of {path!r} was written to while {', '.join(state.names)} was merged into it, so that "
                "merging cannot be undone; load the base model again, and unmerge_adapter before you change weights."
            )


def _move(
    base: nn.Module,
    name: str,
    dim: int,
    now: MergedParameter | None,
    old: Tensor | None,
    new: Tensor | None,
    is_shared: bool,
) -> MergedParameter | None:
    """Let a parameter go from one scale to another; ``None`` is no scale."""
    parameter: Any = base._parameters[name]
    if is_shared:
        original = parameter if now is None or now.original is None else now.original
        if new is None:
            base._parameters[name] = original
            return None
        copy = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
        merge_(as_stored(base, copy), new, dim)
        base._parameters[name] = copy
        return MergedParameter(None, original, _written(copy))
    weight, residual = as_stored(base, parameter), None
    if now is None or old is None:
        residual = None if new is None else merge_(weight, new, dim, exact=True)
    elif now.residual is not None:
        if new is None:
            unmerge_(weight, old, dim, now.residual)
        else:
            residual = swap_(weight, old, new, dim, now.residual)
    return None if residual is None else MergedParameter(residual, None, _written(parameter))


def put(
    layer: Any, names: Sequence[str], scale: Tensor | None, shared: Collection[str], placement: Placement | None = None
) -> None:
    """Let the layer's parameters hold ``scale [n]`` instead of whatever they hold; ``None``: nothing.

    shared: the names of parameters that others use too: scaled copies stand in for them.
    placement: of a quantized layer, where its vectors go.

    Where the layer holds something, what was shared before counts, and its placement.
    """
    base, before = layer.base_layer, layer._merge_state
    placement = placement if before is None else before.placement
    if placement is not None:
        quantized.move(placement, scale)
        layer._merge_state = None if scale is None else MergeState(list(names), scale, {}, placement=placement)
        _note(layer, names)
        return
    old = None if before is None else before.scale
    shared = shared if before is None else before.shared
    done: dict[str, MergedParameter | None] = {}
    steps = list(scaled_parameters(layer))
    try:
        for name, dim in steps:
            now = None if before is None else before.parameters[name]
            done[name] = _move(base, name, dim, now, old, scale, name in shared)
    except BaseException:
        for name, dim in steps:
            if name in done:
                restored = _move(base, name, dim, done[name], scale, old, name in shared)
                if before is not None and restored is not None:
                    before.parameters[name] = restored
        raise
    found = {name: parameter for name, parameter in done.items() if parameter is not None}
    layer._merge_state = None if scale is None else MergeState(list(names), scale, found)
    _note(layer, names)


def restore(layer: Any, state: MergeState | None, shared: Collection[str]) -> None:
    """Let the layer hold what it held before."""
    if state is None:
        put(layer, [], None, shared)
    else:
        put(layer, state.names, state.scale, state.shared, state.placement)


def suspend_layer(layer: Any) -> None:
    """Take out what the layer holds, for :func:`resume_layer` to put back."""
    state = layer._merge_state
    put(layer, state.names, None, ())
    layer._merge_state, layer._is_suspended = state, True


def resume_layer(layer: Any) -> None:
    """Put back what :func:`suspend_layer` took out."""
    state = layer._merge_state
    layer._merge_state = None
    try:
        put(layer, state.names, state.scale, state.shared, state.placement)
    except BaseException:
        layer._merge_state = state
        raise
    layer._is_suspended = False


@contextlib.contextmanager
@torch.no_grad()
def unmerged(layer: Any) -> Iterator[None]:
    """Take out what the layer's parameters hold for the block, and put it back where they are then."""
    state = layer._merge_state
    if state is None or not state.is_exact:
        yield
        return
    was_suspended = layer._is_suspended
    if not was_suspended:
        suspend_layer(layer)
    try:
        yield
    finally:
        weight = layer.base_layer._parameters["weight"]
        state.scale = state.scale.to(weight.device)
        if weight.is_meta:  # there is nothing to hold it any more
            forget(layer)
        elif not was_suspended:
            resume_layer(layer)


def forget(layer: Any) -> None:
    """Leave the parameters as they are, as the layer's own for good."""
    if layer._merge_state is not None and layer._merge_state.placement is not None and not layer._is_suspended:
        quantized.forget(layer._merge_state.placement)
    layer._merge_state, layer._is_suspended = None, False
    _note(layer, [])


def _note(layer: Any, names: Sequence[str]) -> None:
    layer.merged_adapters = list(names)
    layer.note_running()
