"""Vectors multiplied into the weights, and back.

``merge_adapter`` keeps the base layer's own parameters beside the scaled ones, so that undoing it is exact whatever the
vectors are, and costs a copy of the scaled weights meanwhile. ``merge_and_unload`` scales in place and keeps nothing.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ia3_kernels import scale_weight_

from .errors import IA3Error
from .layers import IA3Layer, active_vectors, is_untouched, plain_weight

NamedLayer = tuple[str, IA3Layer]


def check_mergeable(layers: Iterable[NamedLayer]) -> None:
    """Raise :class:`IA3Error` where a weight cannot be scaled (a quantized layer, hooks), before anything is."""
    for path, layer in layers:
        base = layer.base_layer
        if plain_weight(base) is None and not _is_plain_convolution(base):
            raise IA3Error(
                f"cannot merge into {path!r}, a {type(base).__name__} whose weight is not a plain tensor, or which has "
                "hooks; run the model unmerged, or load it unquantized."
            )


def _is_plain_convolution(base: nn.Module) -> bool:
    is_convolution = type(base) in (nn.Conv2d, nn.Conv3d)  # a subclass may compute its weight from another
    return is_convolution and is_untouched(base) and type(base._parameters["weight"]) is nn.Parameter


def _to_merge(layer: IA3Layer, adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters of ``layer`` that the names mean (the active ones) and that its weight does not hold yet."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name in layer.ia3_l and name not in layer.merged_adapters]


def _product(layer: IA3Layer, names: Iterable[str]) -> Tensor:
    """The product of these adapters' vectors, ``[n]``, in fp32 (fp64 where they are)."""
    return functools.reduce(torch.mul, (_wide(vector.detach()) for vector in active_vectors(layer, names))).reshape(-1)


def _wide(values: Tensor) -> Tensor:
    """At least fp32, so that a product is rounded to 16 bits once."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _views(base: nn.Module, parameters: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Views of the weight, as ``[out, in, spatial]``, and the bias among the parameters of ``base``."""
    weight, bias = parameters["weight"].detach(), parameters["bias"]
    weight = weight.t() if isinstance(base, Conv1D) else weight
    return weight, None if bias is None else bias.detach()


def _input_scale_of_rows(base: nn.Module, scale: Tensor) -> Tensor:
    """The scale of a grouped convolution's input channels, as ``[out, in / groups]``: each group has its own."""
    groups: Any = base.groups
    channels: Any = base.out_channels
    return scale.reshape(groups, 1, -1).expand(groups, channels // groups, -1).flatten(0, 1)


def _scale(layer: IA3Layer, scale: Tensor) -> None:
    """Scale the parameters of the base layer, in place; one rounding."""
    base = layer.base_layer
    weight, bias = _views(base, base._parameters)
    if weight.dim() == 2:
        scale_weight_(weight, scale, 1 if layer.is_feedforward else 0)
    else:
        factors = _input_scale_of_rows(base, scale) if layer.is_feedforward else scale[:, None]
        weight.copy_(_wide(weight) * factors.reshape(*factors.shape, *(1,) * (weight.dim() - 2)))
    if bias is not None and not layer.is_feedforward:
        scale_weight_(bias.unsqueeze(1), scale, 0)


def _check_finite(path: str, layer: IA3Layer, scale: Tensor, names: Sequence[str]) -> None:
    """Raise where scaling would give a value that is not finite, told from the largest magnitudes: no copy is made."""
    weight, bias = _views(layer.base_layer, {**layer.base_layer._parameters, **layer._originals})
    # Products grow with |w|, so the largest of each row (column) tells; NaN and infinity come through.
    grouped = weight.unflatten(0, (getattr(layer.base_layer, "groups", 1), -1))  # [groups, out, in, spatial]
    kept = (0, 2) if layer.is_feedforward else (0, 1)
    along = [dim for dim in range(grouped.dim()) if dim not in kept]
    largest = torch.linalg.vector_norm(grouped, ord=float("inf"), dim=along).reshape(-1)
    products = [(_wide(largest) * scale).to(weight.dtype)]
    if bias is not None and not layer.is_feedforward:
        products.append((_wide(bias) * scale).to(bias.dtype))
    if not all(bool(product.isfinite().all()) for product in products):
        raise IA3Error(
            f"merging {', '.join(names)} into {path!r} would give weights that are not finite; the adapter is broken, "
            f"or too large for {str(weight.dtype).removeprefix('torch.')}: nothing was merged."
        )


@torch.no_grad()
def merge(
    layers: Sequence[NamedLayer],
    adapter_names: Sequence[str] | None = None,
    safe: bool = False,
) -> None:
    """Put scaled parameters in the place of the base layers' own, which each layer keeps. All or nothing.

    adapter_names: which of a layer's adapters; the active ones if ``None``. Adapters merged before stay merged, and the
        product of all is rounded once.
    safe: raise if a value would not be finite.

    Raises :class:`IA3Error` and changes nothing.
    """
    todo = [(path, layer, names) for path, layer in layers if (names := _to_merge(layer, adapter_names))]
    if not todo:
        warnings.warn("there is nothing to merge: the adapters are merged already, or not in any layer.", stacklevel=3)
        return
    check_mergeable((path, layer) for path, layer, _ in todo)
    done: list[tuple[IA3Layer, list[str]]] = []
    try:
        for path, layer, names in todo:
            done.append((layer, layer.merged_adapters))
            everything = [*layer.merged_adapters, *names]
            _restore(layer)
            if safe:
                _check_finite(path, layer, _product(layer, everything), names)
            _hold(layer, everything)
    except BaseException:
        for layer, merged in done:
            _restore(layer)
            if merged:
                _hold(layer, merged)
        raise


def _hold(layer: IA3Layer, names: list[str]) -> None:
    """Let an unmerged base layer hold these adapters' vectors."""
    _set_aside(layer)
    _scale(layer, _product(layer, names))
    layer.merged_adapters = names


def _set_aside(layer: IA3Layer) -> None:
    """Give the base layer copies of its parameters to be scaled, and keep its own, so that ties to others stay."""
    base = layer.base_layer
    names = [name for name in ("weight", "bias") if base._parameters.get(name) is not None]
    layer._originals = {name: base._parameters[name] for name in names}
    for name, original in layer._originals.items():
        base._parameters[name] = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)


def _restore(layer: IA3Layer) -> None:
    """Give the base layer its own parameters back."""
    layer.base_layer._parameters.update(layer._originals)
    layer._originals = {}
    layer.merged_adapters = []


def unmerge(layers: Iterable[NamedLayer]) -> None:
    """Give every base layer its own parameters back, to the bit."""
    merged = [layer for _, layer in layers if layer.merged]
    if not merged:
        warnings.warn("there is nothing to unmerge.", stacklevel=3)
    for layer in merged:
        _restore(layer)


@torch.no_grad()
def merge_in_place(
    model: nn.Module,
    layers: Sequence[NamedLayer],
    adapter_names: Sequence[str] | None = None,
    safe: bool = False,
    progressbar: bool = False,
) -> None:
    """Scale the weights of ``model`` where they lie, for good; the arguments are those of :func:`merge`.

    Raises :class:`IA3Error` before anything is changed.
    """
    todo = []
    for path, layer in layers:
        names = _to_merge(layer, adapter_names)
        if names:
            todo.append((path, layer, [*layer.merged_adapters, *names]))
    check_mergeable((path, layer) for path, layer, _ in todo)
    if safe:
        for path, layer, names in todo:
            _check_finite(path, layer, _product(layer, names), names)
    scales = [_product(layer, names) for _, layer, names in todo]
    for _, layer, _ in todo:
        _restore(layer)  # before counting uses: parameters that were set aside may be shared
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for (_, layer, _), scale in tqdm(zip(todo, scales, strict=True), "merging", len(todo), disable=not progressbar):
        _untie(layer.base_layer, uses)
        _scale(layer, scale)


def _untie(base: nn.Module, uses: Counter[int]) -> None:
    """Give ``base`` parameters of its own where others share them: only this layer is to be scaled."""
    for name, parameter in base._parameters.items():
        if parameter is not None and uses[id(parameter)] > 1:
            uses[id(parameter)] -= 1
            base._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
