"""One training step, as the suites `train_step` and `memory` run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .settings import DTYPES, Settings


@dataclass(frozen=True)
class Batch:
    """Inputs of a step: embeddings [batch, tokens, hidden] and labels [batch, tokens]."""

    inputs_embeds: Tensor
    labels: Tensor


def batch(settings: Settings, dtype: str, hidden: int, vocabulary: int) -> Batch:
    """4 sequences of 256 tokens, of 768 on a GPU (of 16, to try the harness), the same for every implementation."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, 16 if settings.quick else 768 if settings.on_gpu else 256)
    embeds = torch.randn(*shape, hidden, generator=generator).to(settings.device, DTYPES[dtype])
    labels = torch.randint(vocabulary, shape, generator=generator).to(settings.device)
    return Batch(embeds, labels)


def leaves(impl: str, model: nn.Module, inputs: Batch) -> tuple[Tensor, list[Tensor]]:
    """The inputs to run `model` on, and the tensors that a step computes gradients of.

    The IA3 vectors; of the frozen model, which has nothing to train, the inputs.
    """
    embeds = inputs.inputs_embeds.detach().clone()
    if impl.startswith("frozen_base"):
        return embeds, [embeds.requires_grad_(True)]
    return embeds, [parameter for parameter in model.parameters() if parameter.requires_grad]


def step_function(impl: str, model: nn.Module, inputs: Batch) -> Callable[[], Tensor]:
    """A function that zeroes the gradients, runs forward and backward, and returns the loss."""
    embeds, wanted = leaves(impl, model, inputs)

    def step() -> Tensor:
        for tensor in wanted:
            tensor.grad = None
        loss: Tensor = model(inputs_embeds=embeds, labels=inputs.labels).loss
        loss.backward()
        return loss

    return step
