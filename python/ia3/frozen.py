"""Frozen linear layers that no vector scales, through our matmul on CPUs.

They are what is left of a step: queries, the attention's output, the language model's head.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

import ia3_kernels

from . import forwards
from .layers import is_scaled, linear_forward


def patch(model: nn.Module) -> None:
    """Give every ``nn.Linear`` and ``Conv1D`` beside the layers with vectors our ``forward``, on CPUs.

    Whether it is the faster one is asked in every call: layers move, and may be trained again.
    """
    inside = {id(layer._modules["base_layer"]) for layer in model.modules() if is_scaled(layer)}
    if not inside or not ia3_kernels.backends.prefers_native():
        return
    for layer in model.modules():
        if type(layer) not in (nn.Linear, Conv1D) or id(layer) in inside or forwards.is_replaced(layer):
            continue
        weight = layer._parameters["weight"]
        if type(weight) is nn.Parameter and weight.device.type in ("cpu", "meta"):
            forwards.replace(layer, linear_forward)


def restore(model: nn.Module) -> None:
    """Take back what :func:`patch` did."""
    for layer in model.modules():
        forwards.restore(layer, (linear_forward,))
