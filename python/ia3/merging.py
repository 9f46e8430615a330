"""Vectors multiplied into the weights where they lie, and out again to the bit, over all layers of a model or none.

What undoing takes is one bit a weight (``ia3_kernels.merge_``). Every merge is made so that it can be undone, because
an error in one layer must leave those before it as they were; where nobody wants to unmerge, the bits are dropped
afterwards. One layer's part is in :mod:`~ia3.held`.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ia3_kernels import stays_finite

from . import held, quantized_merging
from .errors import IA3Error
from .interrupts import held_back
from .layers import IA3Layer, ScaledLayer, active_vectors, is_untouched, plain_weight
from .mlp import up_projections
from .quantized_merging import Route
from .quantized_scales import format_of

NamedLayer = tuple[str, IA3Layer]
# A layer, the adapters that it is to hold, and the product of their vectors (None: nothing)
_Change = tuple[str, IA3Layer, list[str], Tensor | None]


def check_mergeable(model: nn.Module, layers: Iterable[NamedLayer], requantize: bool = False) -> dict[str, Route]:
    """Raise :class:`IA3Error` where a weight cannot be scaled (hooks, scales of too many rows), before anything is.

    Returns where the vectors of quantized layers go, by the layers' names.
    """
    layers, routes = list(layers), {}
    is_quantized = any(format_of(layer.base_layer) is not None for _, layer in layers)
    ups = up_projections(model) if is_quantized else {}
    for path, layer in layers:
        base = layer.base_layer
        if format_of(base) is not None:
            if layer._held is not None and layer._held.route is not None:
                routes[path] = layer._held.route
            elif not base._parameters["weight"].is_meta:
                routes[path] = quantized_merging.find_route(path, layer, ups.get(id(layer)), requantize)
        elif plain_weight(base) is None and not _is_plain_convolution(base):
            raise IA3Error(
                f"cannot merge into {path!r}, a {type(base).__name__} whose weight is not a plain tensor, or which has "
                "hooks; run the model unmerged, or load it unquantized."
            )
        if base._parameters["weight"].is_meta:
            raise IA3Error(f"cannot merge into {path!r}, whose weight is on the meta device; load the weights first.")
        held.check_unwritten(path, layer)
    return routes


def _check_enabled(layers: Iterable[NamedLayer]) -> None:
    """Raise :class:`IA3Error` where vectors are left out at the moment, and weights that held them would show them."""
    for path, layer in layers:
        if layer._disable_adapters:
            raise IA3Error(
                f"the adapters of {path!r} are disabled; leave the disable_adapter() block, or call "
                "enable_adapter_layers, before you merge."
            )


def _is_plain_convolution(base: nn.Module) -> bool:
    is_convolution = type(base) in (nn.Conv2d, nn.Conv3d)  # a subclass may compute its weight from another
    return is_convolution and is_untouched(base) and type(base._parameters["weight"]) is nn.Parameter


def _to_merge(layer: IA3Layer, adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters of ``layer`` that the names mean (the active ones) and that its weight does not hold yet."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name in layer.ia3_l and name not in layer.merged_adapters]


def _change(path: str, layer: IA3Layer, names: list[str]) -> _Change:
    return path, layer, names, _product(layer, names) if names else None


def _product(layer: IA3Layer, names: Iterable[str]) -> Tensor:
    """The product of these adapters' vectors, ``[n]``, in fp32 (fp64 where they are); a copy, since vectors change."""
    product = functools.reduce(torch.mul, (_wide(vector.detach()) for vector in active_vectors(layer, names)))
    return product.reshape(-1).clone()


def _wide(values: Tensor) -> Tensor:
    """At least fp32, so that a product is rounded to 16 bits once."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_finite(path: str, layer: IA3Layer, names: Sequence[str], scale: Tensor) -> None:
    """Raise where scaling an unmerged layer would give a value that is not finite; one reading pass."""
    base = layer.base_layer
    for name, dim in held.scaled_parameters(layer):
        weight = held.as_stored(base, base._parameters[name])
        if not stays_finite(weight, scale, dim):
            raise IA3Error(
                f"merging {', '.join(names)} into {path!r} would give a {name} that is not finite; the adapter is "
                f"broken, or too large for {str(weight.dtype).removeprefix('torch.')}: nothing was merged."
            )


def _address(parameter: Tensor) -> tuple[Any, int]:
    """The same for parameters that share their memory, whether or not they are the same object."""
    is_plain = type(parameter) in (nn.Parameter, Tensor) and not parameter.is_meta
    place = parameter.data_ptr() if is_plain else 0
    return (parameter.device, place) if place else ("object", id(parameter))


def _uses(model: nn.Module) -> Counter[tuple[Any, int]]:
    """How many modules use each parameter; an original that a scaled copy stands in for is in use too."""
    uses = Counter(_address(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for module in model.modules():
        now: held.Held | None = getattr(module, "_held", None) if isinstance(module, ScaledLayer) else None
        if now is not None and not module._is_suspended:
            uses.update(_address(p.original) for p in now.parameters.values() if p.original is not None)
    return uses


def _shared(layer: IA3Layer, uses: Counter[tuple[Any, int]]) -> set[str]:
    """The names of the parameters of an unmerged layer that others use too."""
    parameters = layer.base_layer._parameters
    return {name for name, _ in held.scaled_parameters(layer) if uses[_address(parameters[name])] > 1}


@torch.no_grad()
def _apply(
    model: nn.Module,
    changes: Sequence[_Change],
    safe: bool = False,
    progressbar: bool = False,
    let_through: Callable[[], None] = lambda: None,
    routes: Mapping[str, Route] = MappingProxyType({}),
) -> None:
    """Change all of these layers, or after an exception (an interrupt, too) none."""
    uses = _uses(model)
    done: list[tuple[IA3Layer, held.Held | None, set[str]]] = []
    with held_back() as interrupt:
        try:
            for path, layer, names, scale in changes:
                if path in routes:
                    quantized_merging.check_unshared(routes[path], uses, _address)
                elif safe and scale is not None and layer._held is None:
                    _check_finite(path, layer, names, scale)
            for path, layer, names, scale in tqdm(changes, "merging", disable=not progressbar):
                interrupt()
                let_through()
                before, route = layer._held, routes.get(path)
                if route is not None:
                    held.hold(layer, names, scale, (), route)
                    done.append((layer, before, set()))
                    if safe and scale is not None:
                        quantized_merging.check_finite(route, names)
                    continue
                shared = _shared(layer, uses) if before is None else before.shared
                if safe and scale is not None and before is not None:
                    # Its weights hold other vectors, and without them only can one tell.
                    held.hold(layer, [], None, shared)
                    done.append((layer, before, shared))
                    _check_finite(path, layer, names, scale)
                    before = None
                held.hold(layer, names, scale, shared)
                done.append((layer, before, shared))
            interrupt()
            let_through()
        except BaseException:
            for layer, before, shared in reversed(done):
                held.restore(layer, before, shared)
            raise


def merge(
    model: nn.Module,
    layers: Sequence[NamedLayer],
    adapter_names: Sequence[str] | None = None,
    safe: bool = False,
    exact: bool = True,
    requantize: bool = False,
) -> None:
    """Let the base layers of ``model`` hold the vectors of adapters, in place. All or nothing.

    adapter_names: which of a layer's adapters; the active ones if ``None``. Adapters merged before stay merged, and the
        product of all is rounded once.
    safe: raise if a value would not be finite.
    exact: keep one bit a weight, by which :func:`unmerge` restores every bit; else it refuses. The scales of quantized
        weights, which are few, are always kept.
    requantize: where a quantized weight has no scales for a vector, quantize it anew, with a warning of the error.

    Raises :class:`IA3Error` and changes nothing.
    """
    changes = []
    for path, layer in layers:
        if names := _to_merge(layer, adapter_names):
            changes.append(_change(path, layer, [*layer.merged_adapters, *names]))
    if not changes:
        warnings.warn("there is nothing to merge: the adapters are merged already, or not in any layer.", stacklevel=3)
        return
    _check_enabled(layers)
    routes = check_mergeable(model, ((path, layer) for path, layer, _, _ in changes), requantize)
    _apply(model, changes, safe, routes=routes)
    _warn_of_errors(routes)
    if not exact:
        for _, layer, _, _ in changes:
            _drop_residuals(layer)


def _routes_of(changes: Iterable[_Change]) -> dict[str, Route]:
    """Where the vectors of quantized layers are now."""
    found = ((path, layer._held) for path, layer, _, _ in changes)
    return {path: now.route for path, now in found if now is not None and now.route is not None}


def _warn_of_errors(routes: Mapping[str, Route]) -> None:
    """Say what was quantized anew, and how far it is from the exact weights."""
    found = ((quantized_merging.error_of(route), route.path) for route in routes.values() if route.requantizes)
    errors = sorted((error, path) for error, path in found if error is not None)
    if errors:
        (least, _), (most, path) = errors[0], errors[-1]
        warnings.warn(
            f"{len(errors)} weights were quantized anew, and are between {least:.2g} and {most:.2g} of their norm away "
            f"from the exact scaled ones ({path!r} most); unmerging restores their codes.",
            stacklevel=4,
        )


def _drop_residuals(layer: IA3Layer) -> None:
    if layer._held is not None and layer._held.route is None:
        layer._held.is_exact = False
        for parameter in layer._held.parameters.values():
            parameter.residual = None


def unmerge(model: nn.Module, layers: Iterable[NamedLayer]) -> None:
    """Take the vectors out of every base layer, to the bit. All or nothing; raises :class:`IA3Error`."""
    merged = [(path, layer) for path, layer in layers if layer.merged]
    if not merged:
        warnings.warn("there is nothing to unmerge.", stacklevel=3)
    for path, layer in merged:
        held.check_unwritten(path, layer)
    changes = [_change(path, layer, []) for path, layer in merged if not layer._is_suspended]
    _apply(model, changes, routes=_routes_of(changes))
    for _, layer in merged:
        held.forget(layer)


def swap(model: nn.Module, layers: Sequence[NamedLayer], old: str, new: str) -> None:
    """Let the layers that hold the adapter ``old`` hold ``new`` in its place, in one pass over the weights.

    The result is that of unmerging and merging, bit by bit. All or nothing; raises :class:`IA3Error`.
    """
    if not any(old in layer.merged_adapters for _, layer in layers):
        raise IA3Error(f"adapter {old!r} is not merged into any layer; merge_adapter it first, or merge {new!r} alone.")
    _check_enabled(layers)
    changes = []
    for path, layer in layers:
        names = [name for name in layer.merged_adapters if name not in (old, new)]
        if new in layer.ia3_l:
            names.append(new)
        if names != layer.merged_adapters:
            changes.append(_change(path, layer, names))
    routes = check_mergeable(model, ((path, layer) for path, layer, _, _ in changes))
    _apply(model, changes, routes=routes)
    _warn_of_errors(routes)


def suspend(layers: Iterable[NamedLayer]) -> None:
    """Take out of the weights what they hold, for as long as adapters are disabled. All or nothing."""
    merged = [(path, layer) for path, layer in layers if layer._held is not None and not layer._is_suspended]
    for path, layer in merged:
        held.check_unwritten(path, layer)
    _one_by_one([layer for _, layer in merged], held.suspend, held.resume)


def resume(layers: Iterable[NamedLayer]) -> None:
    """Put back what :func:`suspend` took out, where adapters are not disabled any more. All or nothing."""
    suspended = [layer for _, layer in layers if layer._is_suspended and not layer._disable_adapters]
    _one_by_one(suspended, held.resume, held.suspend)


@torch.no_grad()
def _one_by_one(layers: Sequence[IA3Layer], forward: Callable[[Any], None], backward: Callable[[Any], None]) -> None:
    done: list[IA3Layer] = []
    with held_back() as let_through:
        try:
            for layer in layers:
                let_through()
                forward(layer)
                done.append(layer)
        except BaseException:
            for layer in reversed(done):
                backward(layer)
            raise


def merge_for_good(
    model: nn.Module,
    layers: Sequence[NamedLayer],
    adapter_names: Sequence[str] | None = None,
    safe: bool = False,
    progressbar: bool = False,
    let_through: Callable[[], None] = lambda: None,
    requantize: bool = False,
) -> None:
    """Let the base layers hold the vectors as their own; the arguments are those of :func:`merge`.

    let_through: lets an interrupt through that the caller holds back.

    All or nothing; raises :class:`IA3Error`.
    """
    _check_enabled((path, layer) for path, layer in layers if layer._is_suspended)
    changes = []
    for path, layer in layers:
        if names := _to_merge(layer, adapter_names):
            changes.append(_change(path, layer, [*layer.merged_adapters, *names]))
    routes = check_mergeable(model, ((path, layer) for path, layer, _, _ in changes), requantize)
    _apply(model, changes, safe, progressbar, let_through, routes)
    _warn_of_errors(routes)
    for _, layer in layers:
        held.forget(layer)
