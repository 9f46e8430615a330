"""An adapter as the engine keeps it: this rank's vectors, read from a folder or given, and checked whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.lora.lora_model import LoRAModel

from ia3.checkpoint import KEY_PREFIX, read_tensors
from ia3.config import IA3Config
from ia3.errors import IA3Error

SUFFIX = ".ia3_l"
# By the runtime module: its output's vector and its inputs', as `Scaled.shard` returns them.
Scales = dict[str, tuple[Tensor | None, list[Tensor | None]]]


class IA3Adapter(LoRAModel):
    """An adapter without LoRA's matrices: vLLM counts, registers and evicts it as one of its own."""

    def __init__(self, adapter_id: int, scales: Scales) -> None:
        super().__init__(adapter_id, 1, {})
        self.scales = scales

    def clone(self, lora_model_id: int) -> IA3Adapter:
        return IA3Adapter(lora_model_id, self.scales)


@dataclass(frozen=True)
class Place:
    """Where a layer of a checkpoint is in the running model: in which module, and which of the layers fused there."""

    module: str
    part: int
    scales_output: bool
    scales_input: bool


def read_folder(folder: Path) -> tuple[IA3Config, dict[str, Tensor]]:
    """Return the configuration and the tensors of a saved adapter. Raises :class:`IA3Error`."""
    config = IA3Config.from_pretrained(folder)
    if config.modules_to_save:
        raise IA3Error(
            f"{folder} has modules_to_save ({', '.join(sorted(config.modules_to_save))}), whole layers that the other "
            "requests of a batch would run through as well; serve it merged, with `ia3 merge`."
        )
    return config, read_tensors(folder)


def scales_of(
    source: str, tensors: Mapping[str, Tensor], places: Mapping[str, Place], layers: Mapping[str, Any], rename: Any
) -> Scales:
    """Return this rank's slices of an adapter's vectors, in the host's memory.

    source: what sentences call the adapter. tensors: by the keys of a file. places: by the layers' names in the running
    model, were they not fused. layers: by module. rename: turns a checkpoint's name of a layer into the model's, or
    into None for one that is on another rank.

    Raises :class:`IA3Error` for the first tensor that has no place, or another shape than its place.
    """
    found: dict[str, tuple[list[Tensor | None], list[Tensor | None]]] = {}
    for key, tensor in sorted(tensors.items()):
        path = key.removeprefix(KEY_PREFIX).removesuffix(SUFFIX)
        if not key.endswith(SUFFIX):
            raise IA3Error(f"{source} has the tensor {key!r}, which is no IA3 vector; serve it merged: `ia3 merge`.")
        name = rename(path)
        if name is None:
            continue
        place = places.get(name)
        is_input = tensor.dim() == 2 and tensor.shape[0] == 1 and tensor.shape[1] != 1
        if place is None or not (place.scales_input if is_input else place.scales_output):
            raise IA3Error(_no_place(source, key, name, is_input))
        layer = layers[place.module]
        size, outputs = layer.whole_sizes()
        expected = [1, size] if is_input else [outputs[place.part], 1]
        if list(tensor.shape) != expected or not tensor.is_floating_point():
            raise IA3Error(
                f"{source} has the tensor {key!r} of shape {list(tensor.shape)} and dtype {tensor.dtype}, and the "
                f"model takes a floating-point vector of shape {expected} there; it was saved from another model."
            )
        if not torch.isfinite(tensor).all():
            raise IA3Error(f"{source} has values that are not finite in {key!r}; train the adapter again.")
        sides = found.setdefault(place.module, ([None] * len(outputs), [None] * len(outputs)))
        sides[is_input][place.part] = tensor.detach().to("cpu", torch.float32)
    pin = any(layers[module].device.type == "cuda" for module in found)

    def keep(vector: Tensor | None) -> Tensor | None:
        return vector.pin_memory() if pin and vector is not None else vector

    return {
        module: (keep(output), [keep(vector) for vector in inputs])
        for module, sides in found.items()
        for output, inputs in [layers[module].shard(*sides)]
    }


def _no_place(source: str, key: str, name: str, is_input: bool) -> str:
    if ".experts." in f".{name}.":
        return f"{source} has the tensor {key!r}, of an expert, which this plugin does not scale; serve it merged."
    side = "input" if is_input else "output"
    return (
        f"{source} has the tensor {key!r}, but this server does not scale the {side} of that layer; start it with what "
        "`ia3 vllm-args` prints for this adapter, or load the adapter into the model that it was saved from."
    )


def check_complete(source: str, config: IA3Config, names: set[str], places: Mapping[str, Place]) -> None:
    """Raise :class:`IA3Error` where an adapter lacks the vector of a layer that its own list of targets names.

    names: of the layers that it has vectors for, in the running model.
    """
    targets = config.target_modules
    if not isinstance(targets, set) or config.exclude_modules:
        return
    for name in sorted(places.keys() - names):
        if any(f".{name}".endswith(f".{target}") for target in targets):
            raise IA3Error(f"{source} lacks a vector of {name!r}, which its targets name; copy or save it again.")
