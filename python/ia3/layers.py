"""``IA3Layer``: a frozen layer with learned vectors, computed by ``ia3_kernels``.

The functions here read only attributes that PEFT's IA3 layers have as well (``base_layer``, ``ia3_l``,
``is_feedforward``, ``active_adapters``, ``merged_adapters``), so that they serve those layers too. They look modules
and parameters up in ``_modules`` and ``_parameters``: ``nn.Module.__getattr__`` costs more than an operator's check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from ia3_kernels import scaled_activation, scaled_linear

from . import held
from .errors import IA3Error
from .routing import routing_of

_PLAIN_TENSORS = (nn.Parameter, Tensor)
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
# Packed linear layers that do not inherit from nn.Linear; by name, because they come with optional packages.
_QUANTIZED_LINEARS = frozenset({"GgufLinear"})


def is_untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` does no more than its class's ``forward``: no hooks, no ``forward`` of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not _runs_own_forward(module)
        or nn_module._has_any_global_hook()
    )


def _runs_own_forward(module: nn.Module) -> bool:
    """Whether nothing but :func:`linear_forward`, which computes the same, stands in for the class's ``forward``."""
    patch = module.__dict__.get("forward")
    return patch is None or getattr(patch, "func", None) is linear_forward


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


def linear_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """What ``forward`` of an ``nn.Linear`` or ``Conv1D`` computes, through our matmul where that is the faster one."""
    weight = layer._parameters.get("weight")  # replicas for several devices have none
    y: Tensor
    if weight is None or not _gains(weight):
        y = type(layer).forward(layer, x)
    else:
        matrix = weight if type(layer) is nn.Linear else weight.t()
        y = scaled_linear(x, matrix, layer._parameters["bias"])
    return y


def _gains(weight: Tensor) -> bool:
    """Whether our matmul is faster than torch's for a frozen weight: on CPUs, in 16 bits.

    In fp32 it is for few rows, but there a model without its adapters is to be the base model to the last bit.
    """
    if type(weight) not in _PLAIN_TENSORS or weight.device.type != "cpu" or weight.requires_grad:
        return False
    return weight.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, through our matmul where that computes the same."""
    weight = plain_weight(layer)
    y: Tensor = layer(x) if weight is None else scaled_linear(x, weight, layer._parameters["bias"])
    return y


def effective_scale(layer: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What scales ``layer`` on the input ``x`` ``[*, in]``, and its ``adapter_index``; ``None`` for either.

    The product of the active adapters' vectors as they are stored (``[n, 1]``, ``[1, n]``), without an index; in a
    batch of several adapters their vectors, ``[adapters, n]``, with one, of shape ``[*]`` (of convolutions: ``[N]``).
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None, None
    routing = routing_of(layer)
    if routing is not None:
        is_convolution = isinstance(layer._modules["base_layer"], _CONVOLUTIONS)
        return routing.scale_of(layer, x, x.shape[:1] if is_convolution else x.shape[:-1])
    # With one adapter there is nothing to switch, and a trace may follow its name.
    vectors: Any = layer._modules["ia3_l"]
    if torch.compiler.is_compiling() and len(vectors._parameters) > 1 and _running_is_current(layer):
        running = layer.__dict__["_running"]
    else:
        running = active_vectors(layer)
    scale: Tensor | None = None
    for vector in running:
        scale = vector if scale is None else scale * vector
    return scale, None


def active_vectors(layer: nn.Module, names: Iterable[str] | None = None) -> tuple[Tensor, ...]:
    """The vectors that ``layer`` has of these adapters (of the active ones), as they are stored."""
    vectors: Any = layer._modules["ia3_l"]
    found = []
    wanted: Any = layer.active_adapters if names is None else names
    for name in wanted:
        vector = vectors._parameters.get(name)
        if vector is not None:
            found.append(vector)
        elif name in vectors:
            found.append(vectors[name])  # a sharding wrapper may keep it as a plain attribute
    return tuple(found)


@torch.compiler.assume_constant_result
def _running_is_current(layer: nn.Module) -> bool:
    """Whether ``_running`` still holds the parameters that the names of the active adapters lead to.

    Asked once per trace. What replaced parameters behind the layer's back (sharding) makes it false, and the names are
    traced instead. ``functional_call`` of a compiled model with several adapters cannot be told from here: it gets the
    layer's own vectors.
    """
    running = layer.__dict__.get("_running")
    if running is None:
        return False
    vectors = active_vectors(layer)
    return len(running) == len(vectors) and all(a is b for a, b in zip(running, vectors, strict=True))


def scaled_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """``base(x ∘ l)`` for a feed-forward layer, ``base(x) ∘ l`` for any other; x ``[*, in]`` → ``[*, out]``.

    Convolutions are scaled per channel.
    """
    base: Any = layer._modules["base_layer"]
    y: Tensor
    scale, index = effective_scale(layer, x)
    if scale is None:
        y = base(x) if plain_weight(base) is None else linear_forward(base, x)
        if layer.training and _is_trained_merged(layer):
            names: Any = layer.merged_adapters
            y = _Untrainable.apply(y, names, *active_vectors(layer, names))
    elif (weight := plain_weight(base)) is not None:
        input_scale, output_scale = (scale, None) if layer.is_feedforward else (None, scale)
        y = scaled_linear(x, weight, base._parameters["bias"], input_scale, output_scale, index)
    elif layer.is_feedforward:
        y = base(_scale_channels(base, x, scale, index))
    else:
        y = _scale_channels(base, base(x), scale, index)
    return y


class _Untrainable(torch.autograd.Function):
    """Stands behind the output of a layer whose vectors are in its weight, and raises when one would train them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, names: Sequence[str], *vectors: Tensor) -> Tensor:
        ctx.names = names
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise IA3Error(
            f"{', '.join(ctx.names)} is merged into the weights, where its vectors get no gradient; call "
            "unmerge_adapter before you train."
        )


def _is_trained_merged(layer: nn.Module) -> bool:
    """Whether a training step would silently leave the vectors of a merged layer out."""
    if not isinstance(layer, IA3Layer) or not layer.merged or layer._disable_adapters:
        return False
    is_recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return is_recorded and any(vector.requires_grad for vector in active_vectors(layer, layer.merged_adapters))


def _scale_channels(base: nn.Module, x: Tensor, scale: Tensor, index: Tensor | None) -> Tensor:
    """``x ∘ scale`` along the dimension that ``base`` reads and writes its features in."""
    if not isinstance(base, _CONVOLUTIONS):
        return scaled_activation(x, scale, "identity", index)
    spatial = base.weight.dim() - 2  # x is [N, C, *spatial] or [C, *spatial]
    if index is not None:
        scales = torch.cat([scale, scale.new_ones(1, scale.shape[1])])[index]  # [N, C]; -1 is the last row
        return (x * scales.reshape(*scales.shape, *(1,) * spatial)).to(x.dtype)
    scale = scale.reshape(-1)
    last = x.movedim(-1 - spatial, -1)
    if last.is_contiguous():  # channels_last
        return scaled_activation(last, scale, "identity").movedim(-1, -1 - spatial)
    return (x * scale.reshape(-1, *(1,) * spatial)).to(x.dtype)


def is_scaled(module: nn.Module | None) -> bool:
    """Whether ``module`` is a layer with vectors, ours or PEFT's."""
    return module is not None and "ia3_l" in module._modules


def features(layer: Any) -> tuple[int, int] | None:
    """The input and output features (channels) of a layer that vectors can scale, else ``None``.

    Linear layers of any weight type (quantized ones are recognized by their ``in_features``), ``Conv1D``, ``Conv2d``
    and ``Conv3d``.
    """
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    if isinstance(layer, _CONVOLUTIONS):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear) or type(layer).__name__ in _QUANTIZED_LINEARS:
        return layer.in_features, layer.out_features
    return None


def is_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` is one that vectors can scale, and no convolution."""
    return features(layer) is not None and not isinstance(layer, _CONVOLUTIONS)


class ScaledLayer(nn.Module):
    """What our layers and PEFT's accelerated ones share: the computation, and ``_running``.

    A compiled graph that looked vectors up by their adapter's name would hold for that name only, and activating
    another adapter would compile again. So the layer keeps the active ones in ``_running`` too, where a graph finds
    them without a name; it is renewed whenever they may have changed.
    """

    forward = scaled_forward

    def _note_running(self) -> None:
        self.__dict__["_running"] = active_vectors(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._note_running()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Called before the vectors are loaded, perhaps as new parameters: graphs have to look again.
        self.__dict__["_running"] = None
        super()._load_from_state_dict(*args, **kwargs)


class IA3Layer(ScaledLayer):
    """A frozen linear layer or convolution with learned vectors, one per adapter.

    base_layer: the layer; its parameters are used where they lie.
    is_feedforward: scale the input features (channels) instead of the output's.

    Vectors are shaped as PEFT shapes them: ``[1, in]`` or ``[out, 1]``, and ``[1, channels, 1, 1(, 1)]`` for
    convolutions; fp32 whatever the base's dtype. The ones of all ``active_adapters`` multiply together.
    """

    adapter_layer_names = ("ia3_l",)

    def __init__(self, base_layer: nn.Module, is_feedforward: bool) -> None:
        super().__init__()
        sizes = features(base_layer)
        if sizes is None:
            raise TypeError(f"IA3Layer got a {type(base_layer).__name__}; expected a linear layer or a convolution.")
        self.in_features, self.out_features = sizes
        # Any: a linear layer or a convolution, of whatever library.
        self.base_layer: Any = base_layer
        self.ia3_l = nn.ParameterDict()
        self.is_feedforward = is_feedforward
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        # While merged: what the parameters hold, and whether it was taken out for as long as adapters are disabled.
        self._held: held.Held | None = None
        self._is_suspended = False
        self.training = base_layer.training

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it lies, with vectors in it while merged."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias as it lies, with vectors in it while merged."""
        bias: Tensor | None = self.base_layer.bias
        return bias

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
        base: nn.Module = self.base_layer
        return base

    def vector_shape(self) -> tuple[int, ...]:
        """The shape of one adapter's vector, as PEFT stores it."""
        size = self.in_features if self.is_feedforward else self.out_features
        if isinstance(self.base_layer, _CONVOLUTIONS):
            return (1, size, *(1,) * (self.base_layer.weight.dim() - 2))
        return (1, size) if self.is_feedforward else (size, 1)

    def add_vector(
        self, adapter_name: str, init_ones: bool = True, dtype: torch.dtype = torch.float32, on_meta: bool = False
    ) -> None:
        """Add the vector of an adapter: ones, or normal noise. It is not active yet, and frozen until it is."""
        device = torch.device("meta") if on_meta else self.base_layer.weight.device
        shape = self.vector_shape()
        # Noise comes from the CPU's generator, as in PEFT: the same seed gives the same vectors on any device.
        values = torch.ones(shape) if init_ones else torch.randn(shape)
        self.ia3_l[adapter_name] = nn.Parameter(values.to(device=device, dtype=dtype), requires_grad=False)
        self._note_running()

    def remove_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, where it is known here."""
        if adapter_name in self.ia3_l:
            del self.ia3_l[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
        self._note_running()

    def set_adapter(self, adapter_names: Sequence[str], inference_mode: bool = False) -> None:
        """Activate these adapters: they multiply together, and are trainable unless ``inference_mode``."""
        self.active_adapters = list(adapter_names)
        for name, vector in self.ia3_l.items():
            vector.requires_grad_(name in self.active_adapters and not inference_mode)
        self._note_running()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Moved, converted or laid out anew, the weights could not be unmerged: it is done to the unmerged ones.
        with held.taken_out(self):
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        side = "input" if self.is_feedforward else "output"
        return f"in_features={self.in_features}, out_features={self.out_features}, scales={side}"
