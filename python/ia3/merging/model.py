"""Vectors multiplied into the weights where they lie, and out again bit-exactly, over all layers of a model or none.

What undoing takes is one bit a weight (``ia3_kernels.merge_``). Every merge is made so that it can be undone, because
an error in one layer must leave those before it as they were; where nobody wants to unmerge, the bits are dropped
afterwards. How layers change is in :mod:`~ia3.merging.layer`; here is which, and to what.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ia3_kernels.exact import stay_finite

from ..errors import IA3Error
from ..experts import ExpertsMatrix
from ..layers import vectors_of
from ..mlp import up_projections
from ..patching import runs_class_forward
from ..probing import CONVOLUTIONS, what_linear_computes
from . import quantized
from .formats import format_of
from .layer import MergeState, as_stored, check_unwritten, put_all, restore, scaled_parameters
from .quantized import Placement

NamedLayer = tuple[str, Any]
# A layer with its name, and what it is to hold.
_Change = tuple[str, Any, MergeState | None]


def _check_enabled(layers: Iterable[NamedLayer]) -> None:
    """Raise :class:`IA3Error` where vectors are left out at the moment, and weights that held them would show them."""
    for path, layer in layers:
        if layer._disable_adapters:
            raise IA3Error(
                f"the adapters of {path!r} are disabled; leave the disable_adapter() block, or call "
                "enable_adapter_layers, before you merge."
            )


def _is_plain(base: Any) -> bool:
    """Return whether the rows and columns of a layer's weight are all that its output depends on.

    A subclass counts where it computes what a linear layer does, or runs a convolution's own methods: others may
    compute their weight.
    """
    weight = base._parameters.get("weight")
    if isinstance(base, ExpertsMatrix):
        return type(weight) is nn.Parameter and weight.is_contiguous() and runs_class_forward(base.experts)
    if type(weight) not in (nn.Parameter, Tensor) or not runs_class_forward(base):
        return False
    if isinstance(base, nn.Linear):
        return what_linear_computes(base) == "linear"
    kind = next((kind for kind in (Conv1D, *CONVOLUTIONS) if isinstance(base, kind)), None)
    methods = ("forward", "_conv_forward", "__call__")
    return kind is not None and all(getattr(type(base), name, None) is getattr(kind, name, None) for name in methods)


def to_merge(layer: Any, adapter_names: Sequence[str] | None) -> list[str]:
    """Return the adapters of ``layer`` that the names mean (the active ones) and that its weight does not hold yet."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    vectors, merged = layer._modules["ia3_l"], layer.merged_adapters
    return [name for name in names if name in vectors and name not in merged]


def _to_hold(wanted: Iterable[tuple[str, Any, list[str]]]) -> list[_Change]:
    """Return what becomes of layers that are to hold these adapters: their products are computed, and nothing done.

    Raises :class:`IA3Error` where PEFT has merged.
    """
    found = [(path, layer, names, list(vectors_of(layer, names))) for path, layer, names in wanted]
    for path, layer, _, _ in found:
        if layer.merged_adapters and layer._merge_state is None:
            raise IA3Error(
                f"{', '.join(layer.merged_adapters)} was merged into {path!r} before the model was accelerated; "
                "unmerge_adapter first."
            )
    firsts = [vectors[0].detach().reshape(-1) for _, _, names, vectors in found if names]
    # Copies, because vectors are trained on; in fp32 at least, so that a product is rounded to 16 bits once.
    copies = [torch.empty_like(first, dtype=torch.promote_types(first.dtype, torch.float32)) for first in firsts]
    if copies:
        torch._foreach_copy_(copies, firsts)
    scales, changes = iter(copies), list[_Change]()
    for path, layer, names, vectors in found:
        after = None
        if names:
            others = (vector.detach().reshape(-1) for vector in vectors[1:])
            before: MergeState | None = layer._merge_state
            places = () if before is None else (before.shared, before.placement)
            after = MergeState(names, functools.reduce(torch.mul, others, next(scales)), *places)
        changes.append((path, layer, after))
    return changes


def _check_finite(changes: Iterable[_Change]) -> None:
    """Raise where scaling unmerged layers would give a value that is not finite; one reading pass."""
    found = [
        (path, after, name, as_stored(layer.base_layer, layer.base_layer._parameters[name]), dim)
        for path, layer, after in changes
        if after is not None and after.placement is None
        for name, dim in scaled_parameters(layer, layer.base_layer)
    ]
    are_finite = stay_finite([(weight, after.scale, dim) for _, after, _, weight, dim in found])
    for (path, after, name, weight, _), is_finite in zip(found, are_finite, strict=True):
        if not is_finite:
            # PEFT's words first: scripts look for them.
            part = "weights" if name == "weight" else name
            raise IA3Error(
                f"NaNs detected in the merged {part}. The adapter {', '.join(after.names)} seems to be broken, or too "
                f"large for {str(weight.dtype).removeprefix('torch.')}: merged into {path!r} it would give a {name} "
                "that is not finite; nothing was merged."
            )


def _address(parameter: Tensor) -> tuple[Any, int]:
    """Return the same for parameters that share their memory, whether or not they are the same object."""
    is_plain = type(parameter) in (nn.Parameter, Tensor) and not parameter.is_meta
    place = parameter.data_ptr() if is_plain else 0
    return (parameter.device, place) if place else ("object", id(parameter))


def _uses(model: nn.Module) -> Counter[tuple[Any, int]]:
    """Return how many modules use each parameter; an original that a scaled copy stands in for is in use too."""
    found: list[Tensor | None] = []
    for module in model.modules():
        found += module._parameters.values()
        now: MergeState | None = module.__dict__.get("_merge_state")
        if now is not None and not now.is_suspended:
            found += [parameter.original for parameter in now.parameters.values()]
    return Counter([_address(parameter) for parameter in found if parameter is not None])


def _prepare(model: nn.Module, changes: Sequence[_Change], requantize: bool) -> None:
    """Raise :class:`IA3Error` where a weight cannot be scaled (hooks, scales of too many rows), before anything is.

    What changes is told where its vectors go, if it is quantized, and which of its parameters others use too.
    """
    ups: Mapping[int, Any] | None = None
    new: list[tuple[Any, Any, MergeState]] = []
    for path, layer, after in changes:
        if after is not None:
            base = layer.base_layer
            is_quantized = format_of(base) is not None
            if not is_quantized and not _is_plain(base):
                raise IA3Error(
                    f"cannot merge into {path!r}, a {type(base).__name__} whose weight is not a plain tensor, or which "
                    "has hooks; run the model unmerged, or load it unquantized."
                )
            if base._parameters["weight"].is_meta:
                raise IA3Error(
                    f"cannot merge into {path!r}, whose weight is on the meta device; load the weights first."
                )
            if is_quantized and after.placement is None:
                ups = up_projections(model) if ups is None else ups
                after.placement = quantized.find_placement(path, layer, ups.get(id(layer)), requantize)
            if layer._merge_state is None or after.placement is not None:
                new.append((layer, base, after))
        check_unwritten(path, layer)
    uses = _uses(model) if new else Counter()
    for layer, base, after in new:
        if after.placement is not None:
            quantized.check_unshared(after.placement, uses, _address)
        else:
            names = [name for name, _ in scaled_parameters(layer, base)]
            after.shared = [name for name in names if uses[_address(base._parameters[name])] > 1]


@contextlib.contextmanager
def kept(layers: Iterable[NamedLayer]) -> Iterator[None]:
    """Let the layers' weights hold again what they do now, if the block raises."""
    befores = [(layer, layer._merge_state) for _, layer in layers]
    try:
        yield
    except BaseException:
        restore(befores)
        raise


def _apply(
    model: nn.Module,
    changes: Sequence[_Change],
    safe: bool = False,
    requantize: bool = False,
    progressbar: bool = False,
) -> None:
    """Change all of these layers, or after an exception (an interrupt, too) none."""
    _prepare(model, changes, requantize)
    with kept((path, layer) for path, layer, _ in changes):
        if safe:
            _check_finite(change for change in changes if change[1]._merge_state is None)
            # Others' weights hold vectors, and without them only can one tell.
            held = [
                (path, layer, after)
                for path, layer, after in changes
                if layer._merge_state is not None and after is not None and after.placement is None
            ]
            put_all([(layer, None) for _, layer, _ in held])
            _check_finite(held)
        # All at once: a GPU is waited for once then. One after the other where somebody watches.
        parts = [[change] for change in changes] if progressbar else [changes]
        for part in tqdm(parts, "merging", disable=not progressbar):
            put_all([(layer, after) for _, layer, after in part])
        for _, _, after in changes if safe else ():
            if after is not None and after.placement is not None:
                quantized.check_finite(after.placement, after.names)
    _warn_of_errors([after.placement for _, _, after in changes if after is not None and after.placement is not None])


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
    changes = _changes(layers, adapter_names)
    if not changes:
        # PEFT's words here and in unmerge, since scripts filter warnings by them.
        warnings.warn("All adapters are already merged, nothing to do; or none of them is in any layer.", stacklevel=3)
        return
    _check_enabled(layers)
    _apply(model, changes, safe, requantize)
    for _, _, after in changes:
        if not exact and after is not None and after.placement is None:
            after.is_exact = False
            for parameter in after.parameters.values():
                parameter.residual = None


def merge_for_good(
    model: nn.Module,
    layers: Sequence[NamedLayer],
    adapter_names: Sequence[str] | None = None,
    safe: bool = False,
    progressbar: bool = False,
    requantize: bool = False,
) -> None:
    """Let the base layers hold the vectors, for the wrappers to be taken away; as :func:`merge`."""
    _check_enabled((path, layer) for path, layer in layers if layer.is_suspended)
    _apply(model, _changes(layers, adapter_names), safe, requantize, progressbar)


def _changes(layers: Iterable[NamedLayer], adapter_names: Sequence[str] | None) -> list[_Change]:
    """Return the layers that are to hold more than they do."""
    wanted = []
    for path, layer in layers:
        names = to_merge(layer, adapter_names)
        if names:
            wanted.append((path, layer, [*layer.merged_adapters, *names]))
    return _to_hold(wanted)


def _warn_of_errors(placements: Iterable[Placement]) -> None:
    """Say what was quantized anew, and how far it is from the exact weights."""
    found = ((quantized.error_of(placement), placement.path) for placement in placements if placement.requantizes)
    errors = sorted((error, path) for error, path in found if error is not None)
    if errors:
        (least, _), (most, path) = errors[0], errors[-1]
        warnings.warn(
            f"{len(errors)} weights were quantized anew, and are between {least:.2g} and {most:.2g} of their norm away "
            f"from the exact scaled ones ({path!r} most); unmerging restores their codes.",
            stacklevel=5,
        )


def unmerge(model: nn.Module, layers: Iterable[NamedLayer]) -> None:
    """Take the vectors out of every base layer, bit-exactly. All or nothing; raises :class:`IA3Error`."""
    found = [(path, layer) for path, layer in layers if layer.merged]
    if not found:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
    _apply(model, [(path, layer, None) for path, layer in found if layer._merge_state is not None])
    for _, layer in found:
        if layer.merged:
            layer.unmerge_inexactly()


def swap(model: nn.Module, layers: Sequence[NamedLayer], old: str, new: str) -> None:
    """Let the layers hold the adapter ``new``, and those that hold ``old`` in its place, in one pass over the weights.

    The result is that of unmerging and merging, bit by bit. All or nothing; raises :class:`IA3Error`.
    """
    if not any(old in layer.merged_adapters for _, layer in layers):
        raise IA3Error(f"adapter {old!r} is not merged into any layer; merge_adapter it first, or merge {new!r} alone.")
    _check_enabled(layers)
    wanted = []
    for path, layer in layers:
        names = [name for name in layer.merged_adapters if name not in (old, new)]
        if new in layer.ia3_l:
            names.append(new)
        if names != layer.merged_adapters:
            wanted.append((path, layer, names))
    _apply(model, _to_hold(wanted))


def suspend(layers: Iterable[NamedLayer], is_suspended: bool = True) -> None:
    """Take out of the weights what they hold, for as long as adapters are disabled, or put it back. All or nothing."""
    merged = [(path, layer) for path, layer in layers if layer._merge_state and layer.is_suspended != is_suspended]
    for path, layer in merged:
        check_unwritten(path, layer)
    put_all([(layer, layer._merge_state.anew(is_suspended)) for _, layer in merged])
