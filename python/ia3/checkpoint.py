"""Adapters as files: PEFT's format, read so that a damaged file changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .config import CONFIG_NAME, IA3Config
from .errors import IA3Error
from .files import atomic_folder
from .layers import IA3Linear
from .matching import Plan, carriers

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
# What stands before a module's name in a file: an IA3Model's path to the base model.
KEY_PREFIX = "base_model.model."


def adapter_folder(folder: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where an adapter of this name is saved: ``default`` in the folder itself, any other in a sub-folder."""
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The parameters of one adapter in the base model ``model``, by their keys in a file (no adapter name in them)."""
    tensors: dict[str, Tensor] = {}
    for path, carrier in carriers(model):
        if isinstance(carrier, IA3Linear):
            if adapter_name in carrier.ia3_l:
                tensors[f"{KEY_PREFIX}{path}.ia3_l"] = carrier.ia3_l[adapter_name]
        elif adapter_name in carrier.modules_to_save:
            state = carrier.modules_to_save[adapter_name].state_dict()
            tensors.update({f"{KEY_PREFIX}{path}.{name}": value for name, value in state.items()})
    return tensors


def expected_tensors(plan: Plan) -> dict[str, Tensor]:
    """What a file for this plan holds: tensors of the right shapes and kinds, whose values mean nothing."""
    expected: dict[str, Tensor] = {}
    for target in plan.targets:
        layer = (
            target.module if isinstance(target.module, IA3Linear) else IA3Linear(target.module, target.is_feedforward)
        )
        expected[f"{KEY_PREFIX}{target.path}.ia3_l"] = torch.empty(layer.vector_shape(), device="meta")
    for path, module in plan.saved:
        original = getattr(module, "original_module", module)
        expected.update({f"{KEY_PREFIX}{path}.{name}": value for name, value in original.state_dict().items()})
    return expected


def save_adapter(folder: Path, tensors: dict[str, Tensor], config: IA3Config) -> None:
    """Write the two files of an adapter, both or none of them."""
    # Cloned: safetensors refuses tensors that share memory, such as a head tied to something.
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    with atomic_folder(folder) as content:
        (content / WEIGHTS_NAME).write_bytes(save(plain, metadata={"format": "pt"}))
        (content / CONFIG_NAME).write_text(config.to_json(), "utf-8")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter. Only safetensors: a pickle can run any code. Raises :class:`IA3Error`."""
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
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise IA3Error(f"{path} is damaged: {_damage(data) or error}; copy or save the adapter again.") from None


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


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], source: Path) -> None:
    """Raise a sentence that names the first tensor that does not fit the model."""
    advice = "it was saved from another model or with other target_modules: load it into the model it belongs to"
    for name in sorted(expected.keys() - tensors.keys()):
        raise IA3Error(f"{source} lacks the tensor {name!r}, which the model has a place for; {advice}.")
    for name in sorted(tensors.keys() - expected.keys()):
        raise IA3Error(f"{source} has the tensor {name!r}, which the model has no place for; {advice}.")
    for name, place in expected.items():
        tensor = tensors[name]
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
def copy_tensors(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Write checked tensors into the adapter's parameters."""
    for name, parameter in adapter_tensors(model, adapter_name).items():
        parameter.copy_(tensors[name])
