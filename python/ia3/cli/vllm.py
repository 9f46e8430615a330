"""`ia3 vllm-args`: the command that serves a set of adapters with vLLM."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from ..checkpoint import KEY_PREFIX, read_tensors
from ..config import IA3Config
from ..errors import IA3Error

# What vLLM runs in one batch unless it is told otherwise: more slots would stay empty.
_SEQUENCES = 256


def run(folders: list[Path], model: str | None, names_from: Path | None) -> None:
    """Print one line for a shell. Raises IA3Error where the adapters do not fit together."""
    modules: dict[str, Path] = {}
    bases: dict[str | None, Path] = {}
    outputs: set[str] = set()
    inputs: set[str] = set()
    for folder in folders:
        name = folder.resolve().name
        if name in modules:
            raise IA3Error(f"{modules[name]} and {folder} are both called {name!r}; rename one of the folders.")
        modules[name] = folder
        bases.setdefault(IA3Config.from_pretrained(folder).base_model_name_or_path, folder)
        for key, tensor in read_tensors(folder).items():
            end = ".".join(key.removeprefix(KEY_PREFIX).removesuffix(".ia3_l").split(".")[-2:])
            (inputs if tensor.shape[0] == 1 else outputs).add(end)
    base = model or next(iter(bases))
    if base is None or (model is None and len(bases) > 1):
        told = " and ".join(f"{folder} names {base!r}" for base, folder in list(bases.items())[:2])
        raise IA3Error(f"the adapters do not name one model ({told}); name it with --model.")
    print(" ".join(_command(base, modules, {"outputs": sorted(outputs), "inputs": sorted(inputs)}, names_from)))


def _command(base: str, modules: dict[str, Path], sides: dict[str, list[str]], names_from: Path | None) -> list[str]:
    words = []
    if names_from is not None:  # and not one by one: a folder that appears is a model
        words += ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", f"VLLM_LORA_RESOLVER_CACHE_DIR={shlex.quote(str(names_from))}"]
    words += ["vllm", "serve", shlex.quote(base), "--enable-lora", "--max-lora-rank", "1"]
    words += ["--max-loras", str(min(len(modules), _SEQUENCES)), "--max-cpu-loras", str(max(len(modules), 1))]
    words += ["--additional-config", shlex.quote(json.dumps({"ia3": sides}))]
    words += ["--worker-extension-cls", "ia3_vllm.WorkerExtension"]
    if names_from is None:
        words += ["--lora-modules", *(shlex.quote(f"{name}={folder.resolve()}") for name, folder in modules.items())]
    return words
