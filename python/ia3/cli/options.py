"""What the commands are asked for, as plain values: the command line is parsed without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. `steps` wins over `epochs`; one step is `batch_size * accumulation` sequences.

    `evaluations` is how often the held-out loss is measured, the first and the last step included. The learning rate
    falls to zero along `schedule`, one of SCHEDULES.
    """

    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 1e-2
    schedule: str = "constant"
    evaluations: int = 6
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 takes the likeliest; `top_k` 0 and `top_p` 1 leave nothing out."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' `generate`."""
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return arguments
