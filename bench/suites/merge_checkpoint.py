"""A merged copy of a 4 GB checkpoint, tensor by tensor, against `cp -r`; and what memory that takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ia3 import IA3Config
from ia3.merging.checkpoint import plan_merge, write_merged

from ..measure import round_order
from ..records import Recorder
from ..settings import Settings

# name: (targets, those of them that are feed-forward)
TARGETS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default targets": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "every linear layer": (
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("down_proj",),
    ),
}
# Merges in a process of its own: what that needs at most beyond what its imports and libraries take.
_PEAK = """
import sys, pathlib
from bench.suites.merge_checkpoint import held_bytes, merge_copy, rehearse
base, adapter, out = map(pathlib.Path, sys.argv[1:])
rehearse(out)
held = held_bytes("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
merge_copy(base, adapter, out)
print(held_bytes("VmHWM") - held)
"""


@dataclass(frozen=True)
class Sizes:
    """Of a Llama."""

    layers: int = 8
    hidden: int = 4096
    key_value: int = 1024
    intermediate: int = 14336
    vocabulary: int = 32000

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The layers' weights, by name."""
        outputs = {"q_proj": self.hidden, "k_proj": self.key_value, "v_proj": self.key_value, "o_proj": self.hidden}
        attention = {f"self_attn.{name}": (size, self.hidden) for name, size in outputs.items()}
        wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return {**attention, "mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": narrow}


def make_checkpoint(folder: Path, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint with a shard for every two layers. Its values are noise; no model is loaded from it."""
    folder.mkdir()
    places: dict[str, str] = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    embedding = (sizes.vocabulary, sizes.hidden)
    write(0, {name: _noise(embedding, dtype) for name in ("model.embed_tokens.weight", "lm_head.weight")})
    for first in range(0, sizes.layers, 2):
        write(
            first + 1,
            {
                f"model.layers.{layer}.{name}.weight": _noise(shape, dtype)
                for layer in range(first, min(first + 2, sizes.layers))
                for name, shape in sizes.shapes().items()
            },
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "num_hidden_layers": sizes.layers,
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, sizes: Sizes, targets: tuple[str, ...], feedforward: tuple[str, ...]) -> None:
    """Write an adapter for that checkpoint."""
    folder.mkdir()
    config = IA3Config(target_modules=list(targets), feedforward_modules=list(feedforward))
    (folder / "adapter_config.json").write_text(config.to_json())
    vectors = {}
    for layer in range(sizes.layers):
        for name, (outputs, inputs) in sizes.shapes().items():
            kind = name.rpartition(".")[2]
            if kind in targets:
                shape = (1, inputs) if kind in feedforward else (outputs, 1)
                vectors[f"base_model.model.model.layers.{layer}.{name}.ia3_l"] = 1 + 0.1 * torch.randn(shape)
    save_file(vectors, folder / "adapter_model.safetensors")


def _noise(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """A band of normal noise over and over: making all of it would take longer than measuring."""
    band = torch.randn(min(shape[0], 64), shape[1]).mul_(0.02).to(dtype)
    return band.repeat(-(-shape[0] // len(band)), 1)[: shape[0]].contiguous()


def held_bytes(field: str) -> int:
    """Memory that this process holds (``VmRSS``) or held at most (``VmHWM``), as Linux counts it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field + ":"))


def copy(base: Path, adapter: Path, out: Path) -> None:
    """`cp -r`, which is what the merge is compared with."""
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)


def merge_copy(base: Path, adapter: Path, out: Path) -> None:
    """What `ia3 merge` does."""
    write_merged(plan_merge(base, adapter, out), out)


def rehearse(scratch: Path) -> None:
    """Merge a tiny checkpoint, so that whatever is imported or started at first use is there."""
    sizes = Sizes(1, 64, 32, 128, 64)
    folder = scratch.with_name("rehearsal")
    folder.mkdir()
    try:
        make_checkpoint(folder / "base", sizes)
        make_adapter(folder / "adapter", sizes, *TARGETS["default targets"])
        merge_copy(folder / "base", folder / "adapter", folder / "out")
    finally:
        shutil.rmtree(folder)


def _peak(base: Path, adapter: Path, out: Path) -> int:
    command = [sys.executable, "-c", _PEAK, *map(str, (base, adapter, out))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _times(base: Path, adapter: Path, out: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of both, in turns; each starts with an idle disk and the base in the page cache, where that fits."""
    functions = {"cp -r": copy, "ours": merge_copy}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds + 1):  # the first is a rehearsal
        for name in round_order(list(functions), index):
            os.sync()
            start = time.perf_counter()
            functions[name](base, adapter, out)
            times[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    return {name: values[1:] for name, values in times.items()}


def run(settings: Settings, recorder: Recorder, sizes: Sizes | None = None) -> None:
    """Measures in a temporary folder (of TMPDIR), which needs the checkpoint's size three times.

    sizes: of the checkpoint; 4 GB by default. Raises ValueError where the disk is too full.
    """
    sizes = sizes or (Sizes(2, 256, 128, 512, 1000) if settings.quick else Sizes())
    elements = sizes.layers * sum(a * b for a, b in sizes.shapes().values()) + 2 * sizes.vocabulary * sizes.hidden
    with tempfile.TemporaryDirectory(prefix="ia3-bench-") as name:
        root = Path(name)
        free = shutil.disk_usage(root).free
        if free < 6 * elements:
            raise ValueError(f"{root} has {free:,} bytes free; set TMPDIR to a folder with {6 * elements:,}")
        base, out = root / "base", root / "out"
        make_checkpoint(base, sizes)
        shape = max(*sizes.shapes().values(), (sizes.vocabulary, sizes.hidden), key=lambda shape: shape[0] * shape[1])
        largest = 2 * shape[0] * shape[1]
        total = sum(path.stat().st_size for path in base.iterdir())
        for targets, modules in TARGETS.items():
            case = f"checkpoint of {total / 1e9:.1f} GB, {targets}"
            adapter = root / targets.replace(" ", "_")
            make_adapter(adapter, sizes, *modules)
            times = _times(base, adapter, out, settings.rounds(5))
            nbytes = dict.fromkeys(times, 2 * total)
            recorder.add_times("merge_checkpoint", case, "bf16", times, {"ours": ("cp -r",)}, nbytes)
            peak = _peak(base, adapter, out)
            shutil.rmtree(out)
            ratios = {"largest tensor": peak / largest}
            recorder.add("merge_checkpoint", f"{case}: peak memory", "bf16", "ours", ratios=ratios, nbytes=peak)
