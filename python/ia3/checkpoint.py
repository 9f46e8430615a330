"""Adapters as files: PEFT's format, read so that a damaged file changes nothing."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from yaml import YAMLError  # type: ignore[import-untyped]

from .config import CONFIG_NAME, IA3Config
from .errors import IA3Error
from .files import atomic_folder, atomic_write_text
from .layers import IA3Layer
from .matching import Plan, carriers, named_base_modules

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
# What stands before a module's name in a file: an IA3Model's path to the base model.
KEY_PREFIX = "base_model.model."


def adapter_folder(folder: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where an adapter of this name is saved: ``default`` in the folder itself, any other in a sub-folder."""
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


def adapter_tensors(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The parameters of one adapter in the base model ``model``, by their keys in a file (no adapter name in them).

    state_dict: where to take the tensors from instead, by the names they have in an ``IA3Model``.
    """
    tensors: dict[str, Tensor] = {}
    for path, carrier in carriers(model):
        if isinstance(carrier, IA3Layer):
            if adapter_name in carrier.ia3_l:
                vector = carrier.ia3_l[adapter_name]
                tensors[f"{KEY_PREFIX}{path}.ia3_l"] = _from(
                    state_dict, f"{KEY_PREFIX}{path}.ia3_l.{adapter_name}", vector
                )
        elif adapter_name in carrier.modules_to_save:
            place = f"{KEY_PREFIX}{path}.modules_to_save.{adapter_name}"
            for name, value in carrier.modules_to_save[adapter_name].state_dict(keep_vars=True).items():
                tensors[f"{KEY_PREFIX}{path}.{name}"] = _from(state_dict, f"{place}.{name}", value)
    return tensors


def _from(state_dict: Mapping[str, Tensor] | None, name: str, own: Tensor) -> Tensor:
    if state_dict is None:
        return own
    if name not in state_dict:
        raise IA3Error(f"state_dict lacks {name!r}; pass the state_dict of the whole IA3Model.")
    return state_dict[name]


def _embeddings(model: nn.Module) -> list[nn.Module | None]:
    return [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]


def check_embeddings_unmerged(model: nn.Module) -> None:
    """Raise :class:`IA3Error` where the embeddings to save hold an adapter's vectors, which the file has as well."""
    for embedding in _embeddings(model):
        if isinstance(embedding, IA3Layer) and embedding.merged:
            raise IA3Error(
                f"{', '.join(embedding.merged_adapters)} is merged into the embeddings, which were to be saved; "
                "unmerge_adapter first, or leave save_embedding_layers out."
            )


def embedding_tensors(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of the input and output embeddings, by their keys in a file; a file may hold them, or not."""
    tensors: dict[str, Tensor] = {}
    wanted = _embeddings(model)
    for path, module in named_base_modules(model):
        if any(module is embedding for embedding in wanted):
            for name, value in module.state_dict(keep_vars=True).items():
                key = f"{KEY_PREFIX}{path}.{name}"
                tensors[key] = _from(state_dict, key, value)
    return tensors


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, sharded ones gathered, which all processes have to do together."""
    whole = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in tensors.items()}
    # Cloned: safetensors refuses tensors that share memory, such as a head tied to something.
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in whole.items()}


def expected_tensors(plan: Plan) -> dict[str, Tensor]:
    """What a file for this plan holds: tensors of the right shapes and kinds, whose values mean nothing."""
    expected: dict[str, Tensor] = {}
    for target in plan.targets:
        layer = target.module if isinstance(target.module, IA3Layer) else IA3Layer(target.module, target.is_feedforward)
        expected[f"{KEY_PREFIX}{target.path}.ia3_l"] = torch.empty(layer.vector_shape(), device="meta")
    for path, module in plan.saved:
        original = getattr(module, "original_module", module)
        expected.update({f"{KEY_PREFIX}{path}.{name}": value for name, value in original.state_dict().items()})
    return expected


def save_adapter(folder: Path, tensors: dict[str, Tensor], config: IA3Config) -> None:
    """Write the two files of an adapter, both or none of them."""
    with atomic_folder(folder) as content:
        (content / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        (content / CONFIG_NAME).write_text(config.to_json(), "utf-8")


def write_model_card(folder: Path, config: IA3Config) -> None:
    """Write a ``README.md`` by which model hubs know what the folder holds; one that is there keeps its text."""
    path, base = folder / "README.md", config.base_model_name_or_path
    if path.exists():
        try:
            card = ModelCard.load(path)
        except (ValueError, YAMLError) as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"{path} has metadata that cannot be read ({reason}); it stays as it is.", stacklevel=3)
            return
    else:
        name = f" for `{base}`" if base else ""
        card = ModelCard(
            f"---\n{{}}\n---\n\n# (IA)³ adapter{name}\n\n"
            "Loads with `ia3.IA3Model.from_pretrained` and `peft.PeftModel.from_pretrained`.\n"
        )
    card.data.library_name = "peft"
    card.data.base_model = card.data.base_model or base
    card.data.tags = sorted({*(card.data.tags or ()), "ia3"})
    atomic_write_text(path, str(card))


def read_tensors(folder: Path, key_mapping: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of a saved adapter. Only safetensors: a pickle can run any code. Raises :class:`IA3Error`.

    key_mapping: regular expressions and what to put in their place, applied in turn to keys without their prefix.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / PICKLE_NAME).is_file():
            raise IA3Error(
                f"{folder / PICKLE_NAME} is a pickle, which can run any code when it is read; save the adapter again "
                f"with safe_serialization=True, as {WEIGHTS_NAME}."
            )
        raise IA3Error(f"there is no {WEIGHTS_NAME} in {folder}; name the local folder of a saved adapter.")
    data = path.read_bytes()
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise IA3Error(f"{path} is damaged: {_damage(data) or error}; copy or save the adapter again.") from None
    for pattern, replacement in (key_mapping or {}).items():
        tensors = {
            KEY_PREFIX + re.sub(pattern, replacement, name.removeprefix(KEY_PREFIX)): tensor
            for name, tensor in tensors.items()
        }
    return tensors


def _damage(data: bytes) -> str | None:
    """Which tensor a file cut short lacks, told from its header; ``None`` where the header says nothing."""
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < max(start, 8):
        return f"it ends after {len(data)} bytes, inside its header"
    try:
        entries = json.loads(data[8:start])
        ends = {name: start + entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    cut = sorted((end, name) for name, end in ends.items() if end > len(data))
    return f"it ends after {len(data)} bytes, inside the tensor {cut[0][1]!r}" if cut else None


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    optional: Mapping[str, Tensor],
    source: Path | str,
) -> None:
    """Raise a sentence that names the first tensor that does not fit the model."""
    source = source / WEIGHTS_NAME if isinstance(source, Path) else source
    advice = "it was saved from another model or with other target_modules: load it into the model it belongs to"
    for name in sorted(expected.keys() - tensors.keys()):
        raise IA3Error(f"{source} lacks the tensor {name!r}, which the model has a place for; {advice}.")
    places = {**optional, **expected}
    for name in sorted(tensors.keys() - places.keys()):
        raise IA3Error(f"{source} has the tensor {name!r}, which the model has no place for; {advice}.")
    for name, tensor in tensors.items():
        place = places[name]
        if tensor.shape != place.shape:
            raise IA3Error(
                f"{source} has the tensor {name!r} with shape {list(tensor.shape)}, but the model has shape "
                f"{list(place.shape)} there; {advice}."
            )
        if tensor.is_floating_point() != place.is_floating_point():
            raise IA3Error(
                f"{source} has the tensor {name!r} with dtype {tensor.dtype}, but the model has {place.dtype} there; "
                "save the adapter again."
            )


@torch.no_grad()
def copy_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Any:
    """Write checked tensors into the adapter's parameters and, where the file has them, the embeddings.

    Parameters on the ``meta`` device are replaced by ones on their base layer's. Returns what ``load_state_dict``
    would: no missing keys, no unexpected ones.
    """
    for path, carrier in carriers(model):
        if isinstance(carrier, IA3Layer) and adapter_name in carrier.ia3_l:
            vector, weight = carrier.ia3_l[adapter_name], carrier.base_layer.weight
            if vector.is_meta and not weight.is_meta:
                values = tensors[f"{KEY_PREFIX}{path}.ia3_l"].to(weight.device, vector.dtype)
                carrier.ia3_l[adapter_name] = nn.Parameter(values.clone(), requires_grad=vector.requires_grad)
                carrier._note_running()
    for name, parameter in {**embedding_tensors(model), **adapter_tensors(model, adapter_name)}.items():
        if name in tensors:
            parameter.copy_(tensors[name])
    return _IncompatibleKeys([], [])
