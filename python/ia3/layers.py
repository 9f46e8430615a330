"""``IA3Linear``: a frozen linear layer with learned vectors, computed by ``ia3_kernels``.

The functions here read only attributes that PEFT's IA3 layers have as well (``base_layer``, ``ia3_l``,
``is_feedforward``, ``active_adapters``, ``merged_adapters``), so that they serve those layers too. They look modules
and parameters up in ``_modules`` and ``_parameters``: ``nn.Module.__getattr__`` costs more than an operator's check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from ia3_kernels import scaled_activation, scaled_linear

_PLAIN_TENSORS = (nn.Parameter, Tensor)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` does no more than its class's ``forward``: no hooks, no ``forward`` of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or nn_module._has_any_global_hook()
    )


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The weight ``[out, in]`` of an untouched ``nn.Linear`` or ``Conv1D`` (its transpose, uncopied), else ``None``.

    ``None`` for subclasses and for weights of other tensor types too (quantized, distributed, parametrized): their
    own ``forward`` knows what to do.
    """
    kind = type(layer)
    if (kind is not nn.Linear and kind is not Conv1D) or not is_untouched(layer):
        return None
    weight = layer._parameters.get("weight")
    if weight is None or type(weight) not in _PLAIN_TENSORS:
        return None
    return weight if kind is nn.Linear else weight.t()


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, through our matmul where that computes the same."""
    weight = plain_weight(layer)
    y: Tensor = layer(x) if weight is None else scaled_linear(x, weight, layer._parameters["bias"])
    return y


def effective_scale(layer: nn.Module) -> Tensor | None:
    """The product of the active adapters' vectors, ``[n]``; ``None`` where nothing is to be scaled."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    vectors: Any = layer._modules["ia3_l"]
    names: Any = layer.active_adapters
    scale: Tensor | None = None
    for name in names:
        vector = vectors._parameters.get(name)
        if vector is None:
            if name not in vectors:
                continue
            vector = vectors[name]  # a sharding wrapper may keep it as a plain attribute
        scale = vector if scale is None else scale * vector
    return None if scale is None else scale.reshape(-1)


def scaled_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """``base(x ∘ l)`` for a feed-forward layer, ``base(x) ∘ l`` for any other; x ``[*, in]`` → ``[*, out]``."""
    base: Any = layer._modules["base_layer"]
    y: Tensor
    scale = effective_scale(layer)
    if scale is None:
        y = base(x)
    elif (weight := plain_weight(base)) is not None:
        scales = (scale, None) if layer.is_feedforward else (None, scale)
        y = scaled_linear(x, weight, base._parameters["bias"], *scales)
    elif layer.is_feedforward:
        y = base(scaled_activation(x, scale, "identity"))
    else:
        y = scaled_activation(base(x), scale, "identity")
    return y


def is_supported(layer: nn.Module) -> bool:
    """Whether :class:`IA3Linear` can stand in for ``layer``."""
    return isinstance(layer, (nn.Linear, Conv1D))


class IA3Linear(nn.Module):
    """A frozen ``nn.Linear`` or ``Conv1D`` with learned vectors, one per adapter.

    base_layer: the layer; its parameters are used where they lie.
    is_feedforward: scale the input (vectors ``[1, in_features]``) instead of the output (``[out_features, 1]``).

    Vectors are fp32 whatever the base's dtype; the ones of all ``active_adapters`` multiply together.
    """

    adapter_layer_names = ("ia3_l",)

    def __init__(self, base_layer: nn.Module, is_feedforward: bool) -> None:
        super().__init__()
        if isinstance(base_layer, nn.Linear):
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        elif isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.nx, base_layer.nf
        else:
            raise TypeError(f"IA3Linear got a {type(base_layer).__name__}; expected an nn.Linear or a Conv1D.")
        self.base_layer = base_layer
        self.ia3_l = nn.ParameterDict()
        self.is_feedforward = is_feedforward
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.training = base_layer.training

    forward = scaled_forward

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, unscaled."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, unscaled."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the base weight holds an adapter's vectors."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the vectors are left out of the computation."""
        return self._disable_adapters

    def get_base_layer(self) -> nn.Module:
        """The layer as it was before injection."""
        return self.base_layer

    def vector_shape(self) -> tuple[int, int]:
        """The shape of one adapter's vector, as PEFT stores it."""
        return (1, self.in_features) if self.is_feedforward else (self.out_features, 1)

    def add_vector(self, adapter_name: str, init_ones: bool = True) -> None:
        """Add the vector of an adapter: ones, or normal noise. It is not active yet."""
        device = self.base_layer.weight.device
        shape = self.vector_shape()
        # Noise comes from the CPU's generator, as in PEFT: the same seed gives the same vectors on any device.
        values = torch.ones(shape) if init_ones else torch.randn(shape)
        self.ia3_l[adapter_name] = nn.Parameter(values.to(device=device, dtype=torch.float32))

    def remove_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, where it is known here."""
        if adapter_name in self.ia3_l:
            del self.ia3_l[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def set_adapter(self, adapter_names: Sequence[str], inference_mode: bool = False) -> None:
        """Activate these adapters: they multiply together, and are trainable unless ``inference_mode``."""
        self.active_adapters = list(adapter_names)
        for name, vector in self.ia3_l.items():
            vector.requires_grad_(name in self.active_adapters and not inference_mode)

    def extra_repr(self) -> str:
        side = "input" if self.is_feedforward else "output"
        return f"in_features={self.in_features}, out_features={self.out_features}, scales={side}"
