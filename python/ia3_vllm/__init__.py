"""IA3 adapters in vLLM: a plugin that serves PEFT's folders, mixed freely in one batch.

vLLM finds :func:`register` by its entry point, in each of its processes. Nothing changes until an engine is started
with the key ``"ia3"`` in ``--additional-config``; then its adapters are IA3's, and every flag and endpoint vLLM has
for LoRA serves them. docs/serving.md has the flags, the design and what does not work.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .memory import WorkerExtension, async_push, pack, push

__all__ = ["KEY", "WorkerExtension", "async_push", "pack", "push", "register"]

KEY = "ia3"
# The releases whose adapter code was read and run, the last one excluded. Those before 0.32 know prefix blocks by an
# adapter's name alone, so that new vectors under an old name would meet keys and values of the old ones.
TESTED = ((0, 32), (0, 34))


def register() -> None:
    """Put this package's adapter manager where vLLM's model runners look for theirs; again is once.

    A vLLM outside of the tested releases is left alone, with one sentence in its log.
    """
    import vllm

    release = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if not TESTED[0] <= release < TESTED[1]:
        bounds = [".".join(map(str, bound)) for bound in TESTED]
        sentence = "IA3 adapters are off: this vLLM is %s, and this plugin knows those from %s on and before %s."
        logging.getLogger("vllm.ia3").warning(sentence, vllm.__version__, *bounds)
        return
    runner: Any = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin")
    theirs = runner.LRUCacheWorkerLoRAManager
    if getattr(theirs, "is_ia3", False):
        return

    def make_manager(vllm_config: Any, *arguments: Any, **named: Any) -> Any:
        if _asked(vllm_config) is False:
            return theirs(vllm_config, *arguments, **named)
        from .manager import IA3WorkerManager

        return IA3WorkerManager(vllm_config, *arguments, **named)

    make_manager.is_ia3 = True  # type: ignore[attr-defined]
    runner.LRUCacheWorkerLoRAManager = make_manager
    _let_cpus_compile()
    if os.environ.get("VLLM_LORA_RESOLVER_CACHE_DIR"):
        from vllm.lora.resolver import LoRAResolverRegistry

        from .resolver import NAME, FolderResolver

        LoRAResolverRegistry.register_resolver(NAME, FolderResolver(os.environ["VLLM_LORA_RESOLVER_CACHE_DIR"]))


def _asked(vllm_config: Any) -> Any:
    """Return what an engine was told under the key; False where it was not told anything."""
    configured = vllm_config.additional_config
    return configured.get(KEY, False) if isinstance(configured, dict) else False


def _let_cpus_compile() -> None:
    """Have models with IA3 adapters compiled on CPUs as others are; vLLM's LoRA kernels there cannot be traced."""
    platform = importlib.import_module("vllm.platforms").current_platform
    check = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        asked, lora_config = _asked(vllm_config), vllm_config.lora_config
        if asked is True or (isinstance(asked, dict) and not asked.get("lora")):
            vllm_config.lora_config = None
        try:
            check(vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    if platform.is_cpu():
        platform.check_and_update_config = check_and_update_config


def __getattr__(name: str) -> Any:
    if name in __all__:  # those that need torch
        return getattr(importlib.import_module(".memory", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
