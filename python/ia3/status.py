"""What adapters a model carries and in which state; field for field what PEFT's functions of the same names tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import PeftType
from .errors import IA3Error
from .layers import IA3Layer
from .matching import carriers
from .saved_modules import ModulesToSaveWrapper
from .tuner import IA3Tuner

_Value = TypeVar("_Value")
_Irregular = Literal["irregular"]

# Packed layers, by name because they come with optional packages, and what packed them; PEFT's names where it has any.
_BACKENDS = {"Linear8bitLt": "bnb 8bit", "Linear4bit": "bnb 4bit", "GgufLinear": "gguf"}


@dataclass
class LayerStatus:
    """One scaled layer, or one module that adapters train whole.

    Dictionaries are by adapter name. ``requires_grad`` is ``"irregular"`` where some of an adapter's parameters are
    trained and some are not.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | _Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class ModelStatus:
    """What all layers of a model have in common; ``"irregular"`` where they differ.

    Parameters are counted as :func:`parameter_count` counts them.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | _Irregular
    active_adapters: list[str] | _Irregular
    merged_adapters: list[str] | _Irregular
    requires_grad: dict[str, bool | _Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def parameter_count(parameter: Tensor) -> int:
    """How many values ``parameter`` stands for: those of a packed or partitioned one, not of what is stored here."""
    if type(parameter).__name__ == "Params4bit":  # bitsandbytes: two values a byte
        return parameter.numel() * parameter.element_size() * 2
    stored = parameter.numel()
    whole: int = getattr(parameter, "ds_numel", stored)  # DeepSpeed leaves an empty tensor in each process
    return stored or whole


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """How many parameters of ``model`` are trained, and how many there are."""
    counts = [(parameter_count(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts)


def _common(values: Iterable[_Value]) -> _Value | _Irregular:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "irregular"


def _parameters(carrier: IA3Layer | ModulesToSaveWrapper) -> dict[str, list[Tensor]]:
    """The parameters of each adapter in one layer or head."""
    if isinstance(carrier, IA3Layer):
        return {name: [vector] for name, vector in carrier.ia3_l.items()}
    return {name: list(module.parameters()) for name, module in carrier.modules_to_save.items()}


def _backend(layer: nn.Module) -> str | None:
    """What packed the weight of ``layer``, or ``None``."""
    weight: Any = getattr(layer, "weight", None)
    if type(weight).__module__.partition(".")[0] == "torchao":
        return "torchao"
    return next((_BACKENDS[kind.__name__] for kind in type(layer).__mro__ if kind.__name__ in _BACKENDS), None)


def _layer_status(path: str, carrier: IA3Layer | ModulesToSaveWrapper) -> LayerStatus:
    parameters = _parameters(carrier)
    is_layer = isinstance(carrier, IA3Layer)
    return LayerStatus(
        name=path,
        module_type=type(carrier).__name__,
        enabled=not carrier._disable_adapters,
        active_adapters=list(carrier.active_adapters),
        merged_adapters=list(carrier.merged_adapters) if is_layer else [],
        requires_grad={name: _common(p.requires_grad for p in own) for name, own in parameters.items() if own},
        available_adapters=sorted(parameters),
        devices={name: sorted({p.device.type for p in own}) for name, own in parameters.items()},
        quantization_backend=_backend(carrier.base_layer) if is_layer else None,
    )


def _tuner_of(model: nn.Module) -> IA3Tuner | None:
    tuner = getattr(model, "base_model", None)  # transformers' models have an attribute of this name too
    return tuner if isinstance(tuner, IA3Tuner) else None


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """The adapters of each layer of an ``IA3Model``, or of a model that adapters were injected into.

    Raises :class:`IA3Error` for a model without any.
    """
    rows = [_layer_status(path, carrier) for path, carrier in carriers(_tuner_of(model) or model)]
    if not rows:
        raise IA3Error(
            f"the {type(model).__name__} carries no IA3 adapters; pass what get_peft_model, from_pretrained or "
            "inject_adapter_in_model returned."
        )
    return rows


def _merged(rows: list[LayerStatus]) -> list[str] | _Irregular:
    """The adapters that are merged wherever they are."""
    merged = {name for row in rows for name in row.merged_adapters}
    is_partial = any(merged & (set(row.available_adapters) - set(row.merged_adapters)) for row in rows)
    return "irregular" if is_partial else sorted(merged)


def _grouped(rows: Iterable[Mapping[str, _Value]]) -> dict[str, list[_Value]]:
    grouped: dict[str, list[_Value]] = {}
    for row in rows:
        for name, value in row.items():
            grouped.setdefault(name, []).append(value)
    return grouped


def get_model_status(model: nn.Module) -> ModelStatus:
    """What the layers of :func:`get_layer_status` have in common, and what the model is; raises :class:`IA3Error`."""
    rows = get_layer_status(model)
    tuner = _tuner_of(model)
    base = model if tuner is None else tuner.model
    trainable, total = parameter_counts(model)
    active = _common(tuple(row.active_adapters) for row in rows)
    devices = _grouped(row.devices for row in rows)
    return ModelStatus(
        base_model_type=type(base).__name__ if tuner or isinstance(base, PreTrainedModel) else "other",
        adapter_model_type=type(model).__name__ if tuner else "None",
        peft_types=dict.fromkeys(tuner.peft_config, PeftType.IA3.value) if tuner else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(rows),
        enabled=_common(row.enabled for row in rows),
        active_adapters=list(active) if isinstance(active, tuple) else active,
        merged_adapters=_merged(rows),
        requires_grad={name: _common(own) for name, own in _grouped(row.requires_grad for row in rows).items()},
        available_adapters=sorted({name for row in rows for name in row.available_adapters}),
        devices={name: sorted(set().union(*own)) for name, own in devices.items()},
        quantization_backend=_common(row.quantization_backend for row in rows),
    )
