"""What the parameters of layers hold, and how they get from one vector to another, in place and bit-exactly.

Each function here changes all the layers that it is given or, after an exception, none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ia3_kernels import Residual, merge_
from ia3_kernels.exact import Change, change_, undo_

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
        """Return the same, for :func:`put_all` to bring about."""
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


def put_all(changes: Sequence[tuple[Any, MergeState | None]]) -> None:
    """Let the parameters of layers hold what each state says, which learns how to undo it; ``None``: nothing.

    After an exception, an interrupt at any point included, every layer is as it was.
    """
    befores = [layer._merge_state for layer, _ in changes]
    steps: list[Change] = []
    # Of each step: what the parameter held, the state that is to know of it, its name, and itself
    noted: list[tuple[MergedParameter | None, MergeState | None, str, Any]] = []
    # Parameters that scaled copies stand in for, or that such copies stood in for: where they are, and the one there
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    done: list[Any] = []
    try:
        for (layer, after), before in zip(changes, befores, strict=True):
            state, base = before or after, layer.base_layer
            if state is None:
                continue
            old, new = _held(before), _held(after)
            if state.placement is not None:
                quantized.move(state.placement, new)
                continue
            then = {} if before is None else before.parameters
            for name, dim in scaled_parameters(layer, base):
                now, parameter = then.get(name), base._parameters[name]
                if name in state.shared:
                    replaced.append((base._parameters, name, parameter))
                    merged = _replace(base, name, dim, now, new)
                    if after is not None and merged is not None:
                        after.parameters[name] = merged
                elif new is not None or now is not None:
                    gone, residual = (None, None) if now is None else (old, now.residual)
                    steps.append(Change(as_stored(base, parameter), gone, new, dim, residual))
                    noted.append((now, after, name, parameter))
        for residual, (_, after, name, parameter) in zip(change_(steps, done), noted, strict=True):
            if after is not None and residual is not None:
                after.parameters[name] = MergedParameter(residual, None, _written(parameter))
        for layer, after in changes:
            _note(layer, after)
    except BaseException:
        for (_, after), before in zip(changes, befores, strict=True):
            state = before or after
            if state is not None and state.placement is not None:
                quantized.move(state.placement, _held(before))
        for parameters, name, parameter in reversed(replaced):
            parameters[name] = parameter
        undone = undo_(steps, done) if done else [step.residual for step in steps]
        # An interrupt within a step may have counted it as a write to the weight.
        for residual, (now, _, _, parameter) in zip(undone, noted, strict=False):
            if now is not None:
                now.residual, now.written = residual, _written(parameter)
        for (layer, _), before in zip(changes, befores, strict=True):
            _note(layer, before)
        raise


def _held(state: MergeState | None) -> Tensor | None:
    return None if state is None or state.is_suspended else state.scale


def _replace(
    base: nn.Module, name: str, dim: int, now: MergedParameter | None, new: Tensor | None
) -> MergedParameter | None:
    """Let a scaled copy stand in for a parameter that others share, or the parameter be itself again."""
    original: Any = base._parameters[name] if now is None or now.original is None else now.original
    if new is None:
        base._parameters[name] = original
        return None
    copy = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
    merge_(as_stored(base, copy), new, dim)
    base._parameters[name] = copy
    return MergedParameter(None, original, _written(copy))


def restore(befores: Iterable[tuple[Any, MergeState | None]]) -> None:
    """Let layers hold what they held when these were their states."""
    changed = [(layer, before) for layer, before in befores if layer._merge_state is not before]
    put_all([(layer, None if before is None else before.anew()) for layer, before in changed])


@contextlib.contextmanager
def unmerged(layer: Any) -> Iterator[None]:
    """Take out what the layer's parameters hold for the block, and put it back where they are then."""
    before = layer._merge_state
    if before is None or not before.is_exact:
        yield
        return
    put_all([(layer, before.anew(is_suspended=True))])
    try:
        yield
    finally:
        weight = layer.base_layer._parameters["weight"]
        if weight.is_meta:  # there is nothing to hold it any more
            forget(layer)
        else:
            put_all([(layer, replace(before.anew(), scale=before.scale.to(weight.device)))])


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
