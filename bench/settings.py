"""What one run of the harness measures, and where."""

from __future__ import annotations

import functools
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IMPLEMENTATIONS = (
    "ours",
    "ours+compile",
    "accelerated",  # PEFT's model after ia3.accelerate
    "peft",
    "peft+compile",
    "frozen_base",
    "frozen_base+compile",
)
# Worth their compilation, or able to run at all, on a GPU only.
GPU_IMPLEMENTATIONS = (*IMPLEMENTATIONS, "peft+max-autotune", "liger_peft")


@dataclass(frozen=True)
class Settings:
    """The choices of a run: dtypes by short name, quick sizes or the real ones, implementations, device.

    busy: measure decoding beside a process that keeps one core to itself.
    """

    dtypes: tuple[str, ...] = ("fp32", "bf16")
    quick: bool = False
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    busy: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the run measures a GPU, whose shapes are those of larger models."""
        return self.device.type == "cuda"

    def rounds(self, full: int) -> int:
        """Timed rounds: `full`, or three where only the harness itself is being tried."""
        return 3 if self.quick else full


def device_name(device: torch.device) -> str:
    """The processor's name, with the threads that torch uses on it, or the accelerator's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """The commit that is measured, marked `-dirty` where files differ from it; `unknown` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
