"""Adapters by name: folders in ``VLLM_LORA_RESOLVER_CACHE_DIR`` become models of the server as they are asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from ia3.config import CONFIG_NAME
from ia3.files import read_json

NAME = "IA3 folders"


class FolderResolver(LoRAResolver):
    """Finds an IA3 adapter in the sub-folder of its name; vLLM's own resolver finds LoRA's there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        return await asyncio.to_thread(self._find, lora_name)

    def _find(self, name: str) -> LoRARequest | None:
        try:
            folder = (self._folder / name).resolve()
            if self._folder not in folder.parents:  # a name from the network, with .. or a link in it
                return None
            kind = read_json(folder / CONFIG_NAME).get("peft_type")
        except (OSError, ValueError):
            return None
        return LoRARequest(name, 1, str(folder)) if kind == "IA3" else None  # the server numbers it


def register_resolver(folder: str) -> None:
    """Have vLLM's servers ask for names in ``folder``."""
    LoRAResolverRegistry.register_resolver(NAME, FolderResolver(Path(folder)))
