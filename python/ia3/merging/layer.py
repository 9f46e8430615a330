"""What the parameters of one layer hold, and how they get from one vector to another, in place and bit-exactly.

Each function here changes a layer wholly or, after an exception, not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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

    scale: the product of the vectors that it was multiplied with.
    residual: what undoes it. A parameter that others share has none: it was replaced by a scaled copy, and is kept as
        ``original``.
    written: which tensor it was and how often it had been written to, afterwards.
    """

    scale: Tensor
    residual: Residual | None
    original: nn.Parameter | None
    written: tuple[int, int | None]


@dataclass
class MergeState:
    """What a merged layer holds.

    names, scale: the adapters, and the product of their vectors ``[n]``; kept, because vectors change, and a weight
        must be divided by what it was multiplied with.
    shared: the names of parameters that others use too; scaled copies stand in for them.
    placement: of a quantized layer, where its vectors go; it has no ``parameters``.
    is_suspended: it is taken out of the weights, for as long as adapters are disabled.
    parameters: how to undo it.
    """

    names: list[str]
    scale: Tensor
    shared: Collection[str] = ()
    placement: Placement | None = None
    is_exact: bool = True
    is_suspended: bool = False
    parameters: dict[str, MergedParameter] = field(default_factory=dict)

    def anew(self, is_suspended: bool | None = None) -> MergeState:
        """Return the same, for :func:`put` to bring about."""
        is_suspended = self.is_suspended if is_suspended is None else is_suspended
        return replace(self, is_suspended=is_suspended, parameters={})


def scaled_parameters(layer: Any, base: nn.Module) -> list[tuple[str, int]]:
    """Return which parameters of its base a layer's vectors scale, and along which dimension: 0, the outputs; 1."""
    steps = [("weight", base.dim if isinstance(base, ExpertsMatrix) else int(layer.is_feedforward))]
    if not layer.is_feedforward and base._parameters.get("bias") is not None:
        steps.append(("bias", 0))
    return steps


def as_stored(base: nn.Module, parameter: Tensor) -> Tensor:
    """Return a view of a parameter with outputs first: ``Conv1D`` stores its weight the other way round."""
    if isinstance(base, ExpertsMatrix):
        return base.as_stored(parameter)
    return parameter.t() if isinstance(base, Conv1D) and parameter.dim() == 2 else parameter


def _written(parameter: Tensor) -> tuple[int, int | None]:
    return id(parameter), None if parameter.is_inference() else parameter._version


def check_unwritten(path: str, layer: Any) -> None:
    """Raise :class:`IA3Error` where a merged layer cannot be unmerged any more."""
    state: MergeState | None = layer._merge_state
    if state is None or state.is_suspended:
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
    new: Tensor | None,
    is_shared: bool,
    done: list[Any],
) -> MergedParameter | None:
    """Let a parameter hold another scale; ``None`` is no scale. ``done`` is as in ``ia3_kernels.merge_``."""
    parameter: Any = base._parameters[name]
    if is_shared:
        original = parameter if now is None or now.original is None else now.original
        if new is None:
            base._parameters[name] = original
            return None
        copy = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
        merge_(as_stored(base, copy), new, dim)
        base._parameters[name] = copy
        return MergedParameter(new, None, original, _written(copy))
    weight, residual = as_stored(base, parameter), None
    if now is None:
        residual = None if new is None else merge_(weight, new, dim, exact=True, done=done)
    elif now.residual is not None:
        if new is None:
            unmerge_(weight, now.scale, dim, now.residual, done=done)
        else:
            residual = swap_(weight, now.scale, new, dim, now.residual, done=done)
    return None if new is None or residual is None else MergedParameter(new, residual, None, _written(parameter))


def _move_back(
    base: nn.Module, name: str, dim: int, now: MergedParameter | None, new: Tensor | None, found: Sequence[Tensor]
) -> None:
    """Undo :func:`_move` of a parameter that nobody shares; ``found`` is what the operator returned."""
    moved = None
    if new is not None:
        parity = () if now is None or now.residual is None else (now.residual.parity,)
        moved = MergedParameter(new, Residual(*parity, *found), None, (0, None))
    restored = _move(base, name, dim, moved, None if now is None else now.scale, False, [])
    if now is not None and restored is not None:
        now.residual, now.written = restored.residual, restored.written


def put(layer: Any, after: MergeState | None) -> None:
    """Let the layer's parameters hold what ``after`` says, which learns how to undo it; ``None``: nothing.

    After an exception, an interrupt at any point included, the layer is as it was.
    """
    base, before = layer.base_layer, layer._merge_state
    state = before or after
    if state is None:
        return
    old, new = (None if state is None or state.is_suspended else state.scale for state in (before, after))
    then = {} if before is None else before.parameters
    # With what the parameter is and holds now, and whether it was moved (see ``done`` of ``ia3_kernels.merge_``).
    steps: list[tuple[str, int, Any, Any, list[Any]]] = [
        (name, dim, base._parameters[name], then.get(name), []) for name, dim in scaled_parameters(layer, base)
    ]
    try:
        if state.placement is not None:
            quantized.move(state.placement, new)
        else:
            for name, dim, _, now, done in steps:
                moved = _move(base, name, dim, now, new, name in state.shared, done)
                if after is not None and moved is not None:
                    after.parameters[name] = moved
        _note(layer, after)
    except BaseException:
        if state.placement is not None:
            quantized.move(state.placement, old)
        for name, dim, parameter, now, done in steps:
            if name in state.shared:
                base._parameters[name] = parameter
            elif done:
                _move_back(base, name, dim, now, new, done[0])
        _note(layer, before)
        raise


def restore(layer: Any, before: MergeState | None) -> None:
    """Let the layer hold what it held when its state was ``before``."""
    if layer._merge_state is not before:
        put(layer, None if before is None else before.anew())


@contextlib.contextmanager
def unmerged(layer: Any) -> Iterator[None]:
    """Take out what the layer's parameters hold for the block, and put it back where they are then."""
    before = layer._merge_state
    if before is None or not before.is_exact:
        yield
        return
    put(layer, before.anew(is_suspended=True))
    try:
        yield
    finally:
        weight = layer.base_layer._parameters["weight"]
        if weight.is_meta:  # there is nothing to hold it any more
            forget(layer)
        else:
            put(layer, replace(before.anew(), scale=before.scale.to(weight.device)))


def forget(layer: Any) -> None:
    """Leave the parameters as they are, as the layer's own for good."""
    state: MergeState | None = layer._merge_state
    if state is not None and state.placement is not None and not state.is_suspended:
        quantized.forget(state.placement)
    _note(layer, None)


def _note(layer: Any, state: MergeState | None) -> None:
    # At once, and past the module's own way of taking attributes, which takes longer than a small weight does.
    layer.__dict__.update(_merge_state=state, merged_adapters=[] if state is None else list(state.names))
    layer.note_running()
