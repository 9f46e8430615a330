"""Batches in which every sequence names its adapter: from names to a :class:`~ia3.serving.routing.RowRouting`.

Adapters come from the model itself (parameters, which may train) or from an
:class:`~ia3.serving.bank.AdapterBank` (any number of them, to serve).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import IA3Error
from ..experts import ExpertsMatrix
from ..layers import ScaledLayer, vectors_of
from ..probing import model_type
from .routing import BASE, RowRouting

BASE_NAME = "__base__"  # PEFT's name for no adapter
# Model types some of whose layers see [positions, sequences, n].
_POSITIONS_FIRST = frozenset({"xlnet", "fsmt", "longformer", "led"})
# Arguments whose first dimension is the batch, in the order in which they tell its size.
_BATCHED = ("input_ids", "inputs_embeds", "inputs", "input_features", "input_values", "pixel_values", "encoder_outputs")


@dataclass(frozen=True)
class Sites:
    """What a mixed batch has to know of a model: its scaled layers, and what cannot differ between rows.

    heads: names of modules that adapters train whole.
    experts: names of scaled layers inside experts, which see tokens in an order of their own.
    """

    layers: tuple[tuple[str, ScaledLayer], ...]
    heads: tuple[str, ...]
    experts: tuple[str, ...]


def survey(model: nn.Module) -> Sites:
    """Look through the whole model once."""
    named = list(model.named_modules())
    layers = tuple((path, module) for path, module in named if isinstance(module, ScaledLayer))
    return Sites(
        layers,
        tuple(path for path, module in named if "modules_to_save" in module._modules),
        tuple(
            path
            for path, layer in layers
            if "experts" in path.split(".") and not isinstance(layer.base_layer, ExpertsMatrix)
        ),
    )


class Source(Protocol):
    """Where the vectors of a batch come from."""

    scales: Mapping[nn.Module, Tensor | None]

    def rows(self, names: Sequence[str]) -> list[int]:
        """Return the row of each of these adapters, held for the batch until other names are asked for."""

    def close(self) -> None:
        """Let go of the adapters."""


class MixedBatch:
    """Within the block, each sequence of a batch runs with the adapter named for it, in this thread or coroutine.

    tuner: the model's, ``model.base_model``.
    adapter_names: an adapter for each sequence, ``__base__`` for none.
    repeats: how many copies of each sequence may stand next to each other (beams, returned sequences).

    The vectors of the model's own adapters are read when the block is entered, and gradients reach them. A bank's
    adapters stay in their slots until it is left. Raises :class:`IA3Error`, and changes nothing.
    """

    def __init__(self, tuner: Any, adapter_names: Sequence[str], repeats: int = 1) -> None:
        self._tuner = tuner
        self._names = checked_names(adapter_names)
        self._repeats = repeats
        self._source: Source | None = None
        self._routing: RowRouting | None = None

    @property
    def index(self) -> Tensor:
        """Return the row that each sequence takes, ``[sequences]`` int32 on the model's device: what layers read."""
        return self._open().index

    def assign(self, adapter_names: Sequence[str]) -> None:
        """Name the adapters of the next batch of as many sequences; writes into :attr:`index`, for inference.

        What was compiled or captured with this route stays valid. Raises :class:`IA3Error`, and changes nothing.
        """
        routing, names = self._open(), checked_names(adapter_names)
        assert self._source is not None
        if len(names) != len(self._names):
            raise IA3Error(
                f"adapter_names has {len(names)} names, and this route is for {len(self._names)} sequences; enter a "
                "new one."
            )
        if any(scale is not None and scale.requires_grad for scale in self._source.scales.values()):
            raise IA3Error(
                "this route carries gradients to the adapters that it was entered with; enter a new one for each step "
                "of training, or assign under torch.no_grad()."
            )
        routing.assign(self._source.rows(names))
        self._names = names

    def _open(self) -> RowRouting:
        if self._routing is None:
            raise IA3Error("the route is not entered; use it in a with statement.")
        return self._routing

    # Names are for the host alone: a graph that knew them would hold for them alone.
    @torch.compiler.disable
    def __enter__(self) -> MixedBatch:
        if self._routing is not None:
            raise IA3Error("the route is entered already; make another for a second batch.")
        gate = self._tuner.gate
        with gate.reading():  # what is merged is seen, and what is not yet will not be
            source = open_source(self._tuner, self._names)
            try:
                rows = source.rows(self._names)
                device = next(self._tuner.model.parameters()).device
                self._routing = RowRouting(source.scales, rows, device, self._repeats)
            except BaseException:
                source.close()
                raise
            gate.routes.add(self)
        self._source = source
        self._routing.__enter__()
        return self

    @torch.compiler.disable
    def __exit__(self, *exception: object) -> None:
        assert self._routing is not None
        assert self._source is not None
        self._routing.__exit__()
        self._source.close()
        self._tuner.gate.routes.discard(self)
        self._routing = self._source = None


def checked_names(adapter_names: Any) -> list[str]:
    """Return the names as a list; raises :class:`IA3Error` for anything that is not a list of names."""
    if not isinstance(adapter_names, list | tuple) or not all(isinstance(name, str) for name in adapter_names):
        raise IA3Error(
            f"adapter_names is {adapter_names!r}; expected a list with the name of an adapter for each sequence of the "
            f"batch, {BASE_NAME!r} for none."
        )
    if not adapter_names:
        raise IA3Error("adapter_names is empty; expected a name for each sequence of the batch.")
    return list(adapter_names)


def unknown_name(name: str, known: Iterable[str], place: str) -> IA3Error:
    """Return what to say about an adapter that is nowhere, with names like it: there may be thousands."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:3]
    listed = ", ".join(repr(other) for other in near) + (f" among {len(names)}" if len(names) > len(near) else "")
    return IA3Error(
        f"there is no adapter {name!r}; {place} has {listed or 'none'}: correct the name, use {BASE_NAME!r} for no "
        "adapter, or load it first."
    )


def check_batch(adapter_names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise :class:`IA3Error` unless there is one name for each sequence that a call's arguments hold."""
    size = _batch_size(args, kwargs)
    if size is not None and size != len(adapter_names):
        raise IA3Error(
            f"adapter_names has {len(adapter_names)} name{'s' if len(adapter_names) > 1 else ''}, and the batch has "
            f"{size} sequence{'s' if size > 1 else ''}; pass one name for each, {BASE_NAME!r} for none."
        )


def _batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    candidates = [*args[:1], *(kwargs[name] for name in _BATCHED if kwargs.get(name) is not None)]
    for candidate in candidates:
        tensor = candidate if isinstance(candidate, Tensor) else next(iter(getattr(candidate, "values", list)()), None)
        if isinstance(tensor, Tensor) and tensor.dim():
            return int(tensor.shape[0])
    return None


def generation_repeats(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return how many copies of each prompt ``generate`` makes: one for each beam or returned sequence."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    configs = [config for config in (given, getattr(model, "generation_config", None)) if config is not None]

    def value(name: str) -> Any:
        values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    if value("cache_implementation") == "paged":
        raise IA3Error(
            "cache_implementation is 'paged', which runs in a thread of its own, where adapter_names do not reach; use "
            "generate_batch, which takes adapter_names too."
        )
    return max(value("num_beams") or 1, value("num_return_sequences") or 1)


def _check_state(tuner: Any, sites: Sites) -> None:
    """Raise :class:`IA3Error` where rows cannot run with adapters of their own."""
    layer: Any
    kind = model_type(tuner.model)
    if kind in _POSITIONS_FIRST:
        raise IA3Error(
            f"adapter_names was given, but a model of type {kind!r} has positions before sequences inside, so that a "
            "sequence's rows cannot be told; run one batch for each adapter."
        )
    for path, layer in sites.layers:
        if layer.merged_adapters:
            raise IA3Error(
                f"adapter_names was given, but {path!r} and others have {', '.join(layer.merged_adapters)} merged into "
                "their weights; unmerge_adapter first."
            )
        if layer._disable_adapters:
            raise IA3Error(
                f"adapter_names was given, but adapters are disabled; leave disable_adapter, or name {BASE_NAME!r}."
            )
    if len(tuner.active_adapters) > 1:
        raise IA3Error(
            f"adapter_names was given, but {', '.join(tuner.active_adapters)} are active together, and a row takes one "
            "adapter; set_adapter to one of them."
        )
    if sites.heads:
        raise IA3Error(
            f"adapter_names was given, but adapters train {sites.heads[0]!r} whole, which cannot differ between the "
            "rows of a batch; run one batch for each adapter."
        )
    if sites.experts:
        raise IA3Error(
            f"adapter_names was given, but {sites.experts[0]!r} is part of an expert, which sees tokens in an order of "
            "its own; adapt layers outside of the experts."
        )
    model = tuner.model
    if (
        model.training
        and torch.is_grad_enabled()
        and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    ):
        raise IA3Error(
            "adapter_names was given, but gradient checkpointing computes the layers again in backward, when the names "
            "are gone; call gradient_checkpointing_disable."
        )


def open_source(tuner: Any, names: Sequence[str]) -> Source:
    """Return where these adapters' vectors are, to be closed: the model or its bank. Raises :class:`IA3Error`."""
    sites = tuner.sites()
    _check_state(tuner, sites)
    bank, own = tuner.bank, tuner.peft_config
    wanted = dict.fromkeys(name for name in names if name != BASE_NAME)
    if bank is None:
        return _OwnAdapters(sites, list(own), wanted)
    for name in wanted:
        if name not in own and name not in bank:
            raise unknown_name(name, {*own, *bank}, "the model with its bank")
    in_bank = [name for name in wanted if name in bank]
    in_model = [name for name in wanted if name in own]
    both = [name for name in in_bank if name in own]
    if both:
        raise IA3Error(f"{both[0]!r} is an adapter of the model and one of its bank; rename or unload one of them.")
    if not in_bank and in_model:
        return _OwnAdapters(sites, list(own), wanted)
    vectors = (vector for _, layer in sites.layers for vector in vectors_of(layer, in_model))
    if torch.is_grad_enabled() and any(vector.requires_grad for vector in vectors):
        raise IA3Error(
            f"{in_bank[0]!r} is in the bank and {in_model[0]!r} is an adapter of the model that is trained, and "
            "gradients do not reach it beside a bank's; run the batch under torch.no_grad(), or without the bank's."
        )
    source: Source = bank.lease(sites)
    return source


class _OwnAdapters:
    """The adapters of the model itself, each layer's stacked to ``[adapters, n]``.

    All of them, whichever the batch names: the shape is then the same for every mix, and a compiled graph holds. Those
    that are not named are cut off from gradients, so that an optimizer leaves them alone.
    """

    def __init__(self, sites: Sites, adapters: list[str], wanted: Iterable[str]) -> None:
        self._rows = {BASE_NAME: BASE, **{name: row for row, name in enumerate(adapters)}}
        self.scales: Mapping[nn.Module, Tensor | None] = {
            layer: _stacked(layer, adapters, set(wanted)) for _, layer in sites.layers
        }

    def rows(self, names: Sequence[str]) -> list[int]:
        for name in names:
            if name not in self._rows:
                raise unknown_name(name, self._rows.keys() - {BASE_NAME}, "the model")
        return [self._rows[name] for name in names]

    def close(self) -> None:
        pass


def _stacked(layer: ScaledLayer, adapters: Sequence[str], live: set[str]) -> Tensor | None:
    found = {name: vectors_of(layer, [name]) for name in adapters}
    vectors = {name: vector[0] for name, vector in found.items() if vector}
    if not vectors:
        return None
    some = next(iter(vectors.values()))
    if hasattr(some, "full_tensor"):
        raise IA3Error(
            "adapter_names was given, but the model is sharded, and its vectors are whole only while their layer runs; "
            "load the adapters into a model on one device."
        )
    ones = torch.ones_like(some, requires_grad=False)
    parts = [vectors.get(name, ones) for name in adapters]
    cut = [part if name in live else part.detach() for name, part in zip(adapters, parts, strict=True)]
    return torch.stack([part.reshape(-1) for part in cut])
