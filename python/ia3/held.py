"""What the parameters of one layer hold, and how they get from one vector to another, in place and to the bit.

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

from . import quantized_merging
from .errors import IA3Error
from .quantized_merging import Route


@dataclass
class _Parameter:
    """What one parameter holds.

    residual: what undoes it. A parameter that others share has none: it was replaced by a scaled copy, and is kept as
        ``original``.
    written: which tensor it was and how often it had been written to, afterwards.
    """

    residual: Residual | None
    original: nn.Parameter | None
    written: tuple[int, int | None]


@dataclass
class Held:
    """What a merged layer holds: the adapters' names, the product of their vectors, and how to undo it.

    The product is kept because vectors change, and a weight must be divided by what it was multiplied with. Of a
    quantized layer, ``route`` says which scales hold it, and there are no ``parameters``.
    """

    names: list[str]
    scale: Tensor
    parameters: dict[str, _Parameter]
    is_exact: bool = True
    route: Route | None = None

    @property
    def shared(self) -> set[str]:
        """The names of parameters that others use as well."""
        return {name for name, held in self.parameters.items() if held.original is not None}


def scaled_parameters(layer: Any) -> Iterator[tuple[str, int]]:
    """The names of the parameters that a layer's vectors scale, and along which dimension: 0, the outputs; 1."""
    yield "weight", 1 if layer.is_feedforward else 0
    if not layer.is_feedforward and layer.base_layer._parameters.get("bias") is not None:
        yield "bias", 0


def as_stored(base: nn.Module, parameter: Tensor) -> Tensor:
    """A view of a parameter with outputs first: ``Conv1D`` stores its weight the other way round."""
    return parameter.detach().t() if isinstance(base, Conv1D) and parameter.dim() == 2 else parameter.detach()


def _written(parameter: Tensor) -> tuple[int, int | None]:
    return id(parameter), None if parameter.is_inference() else parameter._version


def check_unwritten(path: str, layer: Any) -> None:
    """Raise :class:`IA3Error` where a merged layer cannot be unmerged any more."""
    held: Held | None = layer._held
    if held is None or layer._is_suspended:
        return
    if held.route is not None:
        quantized_merging.check_unwritten(held.route, held.names)
        return
    if not held.is_exact:
        raise IA3Error(
            f"{', '.join(held.names)} was merged into {path!r} with exact=False, which keeps nothing to undo it with; "
            "load the base model again, or merge with exact=True."
        )
    for name, parameter in held.parameters.items():
        now = _written(layer.base_layer._parameters[name])
        # Another object is a copy of the layer, which brought its residual along.
        if parameter.residual is not None and now[0] == parameter.written[0] and now[1] != parameter.written[1]:
            raise IA3Error(
                f"the {name} of {path!r} was written to while {', '.join(held.names)} was merged into it, so that "
                "merging cannot be undone; load the base model again, and unmerge_adapter before you change weights."
            )


def _move(
    base: nn.Module,
    name: str,
    dim: int,
    now: _Parameter | None,
    old: Tensor | None,
    new: Tensor | None,
    is_shared: bool,
) -> _Parameter | None:
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
        return _Parameter(None, original, _written(copy))
    weight, residual = as_stored(base, parameter), None
    if now is None or old is None:
        residual = None if new is None else merge_(weight, new, dim, exact=True)
    elif now.residual is not None:
        if new is None:
            unmerge_(weight, old, dim, now.residual)
        else:
            residual = swap_(weight, old, new, dim, now.residual)
    return None if residual is None else _Parameter(residual, None, _written(parameter))


def hold(
    layer: Any, names: Sequence[str], scale: Tensor | None, shared: Collection[str], route: Route | None = None
) -> None:
    """Let the layer's parameters hold ``scale [n]`` instead of whatever they hold; ``None``: nothing.

    shared: the names of parameters that others use too: scaled copies stand in for them.
    route: of a quantized layer, where its vectors go.

    Where the layer holds something, what was shared before counts, and its route.
    """
    base, before = layer.base_layer, layer._held
    route = route if before is None else before.route
    if route is not None:
        quantized_merging.move(route, scale)
        layer._held = None if scale is None else Held(list(names), scale, {}, route=route)
        layer.merged_adapters = list(names)
        return
    old = None if before is None else before.scale
    shared = shared if before is None else before.shared
    done: dict[str, _Parameter | None] = {}
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
    layer._held = None if scale is None else Held(list(names), scale, found)
    layer.merged_adapters = list(names)


def restore(layer: Any, held: Held | None, shared: Collection[str]) -> None:
    """Let the layer hold what it held before."""
    if held is None:
        hold(layer, [], None, shared)
    else:
        hold(layer, held.names, held.scale, held.shared, held.route)


def suspend(layer: Any) -> None:
    """Take out what the layer holds, for :func:`resume` to put back."""
    held = layer._held
    hold(layer, held.names, None, ())
    layer._held, layer._is_suspended = held, True


def resume(layer: Any) -> None:
    """Put back what :func:`suspend` took out."""
    held = layer._held
    layer._held = None
    try:
        hold(layer, held.names, held.scale, held.shared, held.route)
    except BaseException:
        layer._held = held
        raise
    layer._is_suspended = False


@contextlib.contextmanager
@torch.no_grad()
def taken_out(layer: Any) -> Iterator[None]:
    """Within the block the layer's parameters hold nothing; what they held is put back where they are then."""
    held = layer._held
    if held is None or not held.is_exact:
        yield
        return
    was_suspended = layer._is_suspended
    if not was_suspended:
        suspend(layer)
    try:
        yield
    finally:
        weight = layer.base_layer._parameters["weight"]
        held.scale = held.scale.to(weight.device)
        if weight.is_meta:  # there is nothing to hold it any more
            forget(layer)
        elif not was_suspended:
            resume(layer)


def forget(layer: Any) -> None:
    """Leave the parameters as they are, as the layer's own for good."""
    if layer._held is not None and layer._held.route is not None and not layer._is_suspended:
        quantized_merging.forget(layer._held.route)
    layer._held, layer._is_suspended, layer.merged_adapters = None, False, []
