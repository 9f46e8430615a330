"""Adapters by name: folders in ``VLLM_LORA_RESOLVER_CACHE_DIR`` become models of the server as they are asked for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from ia3.config import CONFIG_NAME

NAME = "IA3 folders"


def kind_of(folder: Path) -> str | None:
    """Return PEFT's name of the kind of a saved adapter; None for a folder that cannot be read as one."""
    try:
        kind: str | None = json.loads((folder / CONFIG_NAME).read_bytes()).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return None
    return kind


class FolderResolver(LoRAResolver):
    """Finds an IA3 adapter in the sub-folder of its name; vLLM's own resolver finds LoRA's there."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).resolve()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        return await asyncio.to_thread(self._find, lora_name)

    def _find(self, name: str) -> LoRARequest | None:
        if "\0" in name or self._folder not in (folder := (self._folder / name).resolve()).parents:
            return None  # a name from the network, with .. or a link in it
        return LoRARequest(name, 1, str(folder)) if kind_of(folder) == "IA3" else None  # the server numbers it
