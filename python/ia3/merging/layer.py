"""What the parameters of layers hold, and how they get from one vector to another, in place and bit-exactly.

Each function here changes all the layers that it is given or, after an exception, none.
"""

from __future__ import annotations

import contextlib
import weakref
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
    written: which tensor it was and how often it had been written to, afterwards; None in a copy of the layer.
    """

    residual: Residual | None
    original: nn.Parameter | None
    written: tuple[weakref.ref[Tensor], int | None] | None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "written": None}


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


def _written(parameter: Tensor) -> tuple[weakref.ref[Tensor], int | None]:
    return weakref.ref(parameter), None if parameter.is_inference() else parameter._version


def _is_unwritten(parameter: Tensor, now: MergedParameter) -> bool:
    """Return whether nobody has written to a parameter since it holds this; another one brought its residual along."""
    return now.written is None or now.written[0]() is not parameter or now.written == _written(parameter)


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
    for name, now in state.parameters.items():
        if now.residual is not None and not _is_unwritten(layer.base_layer._parameters[name], now):
            raise IA3Error(
                f"the {name} of {path!r} was written to while {', '.join(state.names)} was merged into it, so that "
                "merging cannot be undone; load the base model again, and unmerge_adapter before you change weights."
            )


@dataclass
class _Step:
    """A parameter whose weights are to change.

    now: what it holds; None for no scale. after: the state of its layer that is to know what undoes the change.
    """

    parameter: Any
    name: str
    change: Change
    now: MergedParameter | None
    after: MergeState | None


def put_all(changes: Iterable[tuple[Any, MergeState | None]]) -> None:
    """Let the parameters of layers hold what each state says, which learns how to undo it; ``None``: nothing.

    After an exception every layer is as it was; after an interrupt at any point too, where compiled kernels change the
    weights (Triton's launches and the reference are Python, within which one may come).
    """
    wanted = [(layer, layer._merge_state, after) for layer, after in changes]
    steps: list[_Step] = []
    done: list[Any] = []
    with contextlib.ExitStack() as undo:  # all of it runs, even where some of it raises
        undo.callback(_take_back, steps, done)
        for layer, before, after in wanted:
            state, base = before or after, layer.base_layer
            if state is None:  # PEFT may have merged it, and its note stays
                continue
            undo.callback(_note, layer, before)
            old, new = _held(before), _held(after)
            if state.placement is not None:
                undo.callback(quantized.move, state.placement, old)
                quantized.move(state.placement, new)
                continue
            then = {} if before is None else before.parameters
            for name, dim in scaled_parameters(layer, base):
                now, parameter = then.get(name), base._parameters[name]
                if name in state.shared:
                    undo.callback(base._parameters.__setitem__, name, parameter)
                    merged = _replace(base, name, dim, now, new)
                    if after is not None and merged is not None:
                        after.parameters[name] = merged
                elif new is not None or now is not None:
                    gone, residual = (None, None) if now is None else (old, now.residual)
                    change = Change(as_stored(base, parameter), gone, new, dim, residual)
                    steps.append(_Step(parameter, name, change, now, after))
        for step, found in zip(steps, change_([step.change for step in steps], done), strict=True):
            if step.after is not None and found is not None:
                step.after.parameters[step.name] = MergedParameter(found, None, _written(step.parameter))
        for layer, before, after in wanted:
            if before is not None or after is not None:
                _note(layer, after)
        undo.pop_all()


def _take_back(steps: Sequence[_Step], done: Sequence[Any]) -> None:
    """Let parameters hold what they did before :func:`change_`, if that has changed them.

    Their states count no write that is undone; those of others were looked for before (:func:`check_unwritten`).
    """
    changes = [step.change for step in steps]
    for step, residual in zip(steps, undo_(changes, done) if done else [c.residual for c in changes], strict=True):
        if step.now is not None:
            step.now.residual, step.now.written = residual, _written(step.parameter)


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
    check_unwritten("layer", layer)
    put_all([(layer, before.anew(is_suspended=True))])
    with contextlib.ExitStack() as otherwise:
        if not before.is_suspended:
            otherwise.callback(_forget_suspended, layer)
        try:
            yield
        finally:
            weight = layer.base_layer._parameters["weight"]
            if weight.is_meta:  # there is nothing to hold it any more
                forget(layer)
            else:
                put_all([(layer, replace(before.anew(), scale=before.scale.to(weight.device)))])


def _forget_suspended(layer: Any) -> None:
    """Let vectors act beside the weights again, where nothing could put them back into these."""
    if layer._merge_state is not None and layer._merge_state.is_suspended:
        forget(layer)


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
