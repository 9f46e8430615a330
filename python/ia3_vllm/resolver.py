"""Adapters by name: folders in ``VLLM_LORA_RESOLVER_CACHE_DIR`` become models of the server as they are asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from ia3.config import CONFIG_NAME
from ia3.errors import IA3Error
from ia3.files import read_json

NAME = "IA3 folders"


def kind_of(folder: Path) -> object:
    """Return PEFT's name of the kind of a saved adapter; None for a folder that cannot be read as one."""
    try:
        return read_json(folder / CONFIG_NAME).get("peft_type")
    except IA3Error:
        return None


class FolderResolver(LoRAResolver):
    """Finds an IA3 adapter in the sub-folder of its name; vLLM's own resolver finds LoRA's there."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).resolve()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        return await asyncio.to_thread(self._find, lora_name)

    def _find(self, name: str) -> LoRARequest | None:
        try:  # a name from the network, with zeros, .. or a link in it
            folder = (self._folder / name).resolve()
        except (OSError, ValueError, RuntimeError):
            return None
        is_ours = self._folder in folder.parents and kind_of(folder) == "IA3"
        return LoRARequest(name, 1, str(folder)) if is_ours else None  # the server numbers it
