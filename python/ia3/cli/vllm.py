"""`ia3 vllm-args`: the command that serves a set of adapters with vLLM."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from typer import Argument, Option

from ..errors import IA3Error

# What vLLM runs in one batch unless it is told otherwise: more slots would stay empty.
_SEQUENCES = 256


def run(
    adapters: list[Path] = Argument(metavar="FOLDER...", help="The adapters' folders."),
    model: str | None = Option(None, help="The model, where the adapters name another or none."),
    by_name: Path | None = Option(
        None, metavar="FOLDER", help="Serve whatever adapters are in this folder, now or later."
    ),
) -> None:
    """Print the command that serves adapters with vLLM."""
    from ..checkpoint import KEY_PREFIX, read_tensors
    from ..config import IA3Config

    modules: dict[str, Path] = {}
    bases: dict[str | None, Path] = {}
    outputs: set[str] = set()
    inputs: set[str] = set()
    for folder in adapters:
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
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", "1"]
    words += ["--max-loras", str(min(len(modules), _SEQUENCES)), "--max-cpu-loras", str(len(modules))]
    words += ["--additional-config", json.dumps({"ia3": {"outputs": sorted(outputs), "inputs": sorted(inputs)}})]
    words += ["--worker-extension-cls", "ia3_vllm.WorkerExtension"]
    environment = ""
    if by_name is None:
        words += ["--lora-modules", *(f"{name}={folder.resolve()}" for name, folder in modules.items())]
    else:  # and not one by one: a folder that appears is a model
        place = shlex.quote(str(by_name))
        environment = f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_LORA_RESOLVER_CACHE_DIR={place} "
    print(environment + shlex.join(words))
