"""The computation of a layer with learned vectors, by ``ia3_kernels``, and of the frozen linear layers beside it.

The functions here read what PEFT's IA3 layers have (``base_layer``, ``ia3_l``, ``is_feedforward``, ``active_adapters``,
``merged_adapters``). They look modules and parameters up in ``_modules`` and ``_parameters``: ``nn.Module.__getattr__``
costs more than an operator's check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

import ia3_kernels
from ia3_kernels import scaled_activation, scaled_linear

from . import patching
from .errors import IA3Error
from .probing import CONVOLUTIONS, is_scaled

_PLAIN_TENSORS = (nn.Parameter, Tensor)


class Routing(Protocol):
    """Which adapter each row of a batch takes; see :mod:`ia3.serving.routing`."""

    scales: Mapping[nn.Module, Tensor | None]
    outer: Routing | None

    def scale_of(self, layer: nn.Module, x: Tensor, batch_shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
        """Return the scale of ``layer`` and its ``adapter_index``; ``None`` for either."""


_routing: ContextVar[Any] = ContextVar("ia3_routing")
route = _routing.set


class _Current:
    """What routes the batches of this context: of a thread, or of one of its coroutines.

    A compiler cannot look into a context variable, but takes a property whose function is C's for an attribute, and its
    graphs ask for it in every call. Where nothing was set, the function returns its argument: this object, which routes
    no layer.
    """

    routing: Any = property(_routing.get)
    scales: Mapping[nn.Module, Tensor | None] = MappingProxyType({})
    outer: None = None


current = _Current()


def routing_of(layer: nn.Module) -> Routing | None:
    """Return what routes ``layer`` in this context now; None where its active adapters apply to all rows alike."""
    routing = current.routing
    while routing is not None and layer not in routing.scales:
        routing = routing.outer  # another model's, whose generation runs this one (an assistant, say)
    return routing  # type: ignore[no-any-return]


def is_untouched(module: nn.Module) -> bool:
    """Return whether calling ``module`` runs its class's ``forward`` alone: no hooks, no function in its place."""
    patch = module.__dict__.get("forward")
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (patch is not None and getattr(patch, "func", None) is not linear_forward)
        or nn_module._has_any_global_hook()
    )


def plain_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight ``[out, in]`` of an untouched ``nn.Linear`` or ``Conv1D`` (a transposed view), else ``None``.

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


@patching.stand_in
def linear_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute what ``forward`` of an ``nn.Linear`` or ``Conv1D`` does, in ``scaled_linear`` where that is faster."""
    weight = layer._parameters.get("weight")  # replicas for several devices have none
    y: Tensor
    if weight is None or not _gains(weight):
        y = type(layer).forward(layer, x)
    else:
        matrix = weight if type(layer) is nn.Linear else weight.t()
        y = scaled_linear(x, matrix, layer._parameters["bias"])
    return y


def _gains(weight: Tensor) -> bool:
    """Return whether ``scaled_linear`` is faster than torch for a frozen weight: on CPUs, in 16 bits.

    In fp32 it is for few rows, but there a model without its adapters is to be the base model to the last bit.
    """
    if type(weight) not in _PLAIN_TENSORS or weight.device.type != "cpu" or weight.requires_grad:
        return False
    return weight.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)``, through ``scaled_linear`` where that computes the same."""
    weight = plain_weight(layer)
    y: Tensor = layer(x) if weight is None else scaled_linear(x, weight, layer._parameters["bias"])
    return y


def effective_scale(layer: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return what scales ``layer`` on the input ``x`` ``[*, in]``, and its ``adapter_index``; ``None`` for either.

    The product of the acting adapters' vectors as they are stored (``[n, 1]``, ``[1, n]``), without an index; in a
    batch of several adapters their vectors, ``[adapters, n]``, with one, of shape ``[*]`` (of convolutions: ``[N]``).
    """
    if layer._disable_adapters:
        return None, None
    routing = routing_of(layer)
    if routing is not None:
        is_convolution = isinstance(layer._modules.get("base_layer"), CONVOLUTIONS)
        return routing.scale_of(layer, x, x.shape[:1] if is_convolution else x.shape[:-1])
    # With one adapter there is nothing to switch, and a trace may follow its name.
    vectors: Any = layer._modules["ia3_l"]
    if torch.compiler.is_compiling() and len(vectors._parameters) > 1 and _running_is_current(layer):
        running = layer.__dict__["_running"]
    else:
        running = vectors_of(layer, acting_adapters(layer))
    scale: Tensor | None = None
    for vector in running:
        scale = vector if scale is None else scale * vector
    return scale, None


def queries_key(adapter_name: str) -> str:
    """Return the name of the buffer that says which outputs of a layer an adapter leaves alone."""
    return f"queries_{adapter_name}"


def acting_adapters(layer: Any) -> Sequence[str]:
    """Return the adapters whose vectors multiply in the computation: the active ones that the weight does not hold."""
    active: Sequence[str] = layer.active_adapters
    merged = layer.merged_adapters
    return [name for name in active if name not in merged] if merged else active


def vectors_of(layer: nn.Module, names: Iterable[str]) -> tuple[Tensor, ...]:
    """Return the vectors that ``layer`` has of these adapters, as stored; ones for queries that they leave alone."""
    vectors: Any = layer._modules["ia3_l"]
    found = []
    for name in names:
        vector = vectors._parameters.get(name)
        if vector is None and name in vectors:
            vector = vectors[name]  # a sharding wrapper may keep it as a plain attribute
        if vector is None:
            continue
        mask = layer._buffers.get(queries_key(name)) if layer._buffers else None
        found.append(vector if mask is None else vector.masked_fill(mask, 1.0))
    return tuple(found)


@torch.compiler.assume_constant_result
def _running_is_current(layer: nn.Module) -> bool:
    """Return whether ``_running`` still holds the parameters that the names of the acting adapters lead to.

    Asked once per trace. What replaced parameters behind the layer's back (sharding) makes it false, and the names are
    traced instead. ``functional_call`` of a compiled model with several adapters cannot be told from here: it gets the
    layer's own vectors.
    """
    running = layer.__dict__.get("_running")
    if running is None:
        return False
    vectors = vectors_of(layer, acting_adapters(layer))
    return len(running) == len(vectors) and all(a is b for a, b in zip(running, vectors, strict=True))


def scaled_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute ``base(x ∘ l)`` for a feed-forward layer, ``base(x) ∘ l`` for any other; x ``[*, in]`` → ``[*, out]``.

    Convolutions are scaled per channel.
    """
    base: Any = layer._modules["base_layer"]
    y: Tensor
    scale, index = effective_scale(layer, x)
    if scale is None:
        y = refuse_training(layer, base(x) if plain_weight(base) is None else linear_forward(base, x))
    elif (weight := plain_weight(base)) is not None:
        input_scale, output_scale = (scale, None) if layer.is_feedforward else (None, scale)
        y = scaled_linear(x, weight, base._parameters["bias"], input_scale, output_scale, index)
    elif layer.is_feedforward:
        y = base(_scale_channels(base, x, scale, index))
    else:
        y = _scale_channels(base, base(x), scale, index)
    return y


def refuse_training(layer: Any, y: Tensor) -> Tensor:
    """Return the output of a layer, which raises in backward where the layer's weight holds vectors to be trained."""
    if layer.training and layer.merged_adapters and _trains_merged(layer):
        names: Any = layer.merged_adapters
        y = _Untrainable.apply(y, names, *vectors_of(layer, names))
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


def _trains_merged(layer: Any) -> bool:
    """Return whether a training step would silently leave the vectors of a merged layer out."""
    if layer._disable_adapters or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return any(vector.requires_grad for vector in vectors_of(layer, layer.merged_adapters))


def _scale_channels(base: nn.Module, x: Tensor, scale: Tensor, index: Tensor | None) -> Tensor:
    """Return ``x ∘ scale`` along the dimension that ``base`` reads and writes its features in."""
    if not isinstance(base, CONVOLUTIONS):
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


class Wrapper(nn.Module):
    """A module around ``base_layer``, which answers for it what it does not have itself."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A model's own code may ask a layer for its stride or its bits. What begins with an underscore is
            # somebody's mark on the layer inside, and not on this one.
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)


class ScaledLayer(Wrapper):
    """The first base of an accelerated layer, whose second is PEFT's class: the computation, and ``_running``.

    A compiled graph that looked vectors up by their adapter's name would hold for that name only, and activating
    another adapter would compile again. So the layer keeps the acting ones in ``_running`` too, where a graph finds
    them without a name; it is renewed whenever they may have changed.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        return scaled_forward(self, x)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        # By which PEFT places vectors: for offloaded weights, where they run.
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)  # type: ignore[misc]
        return patching.execution_device(base_layer) or device, dtype

    def note_running(self) -> None:
        """Renew ``_running``."""
        # What is computed from vectors would be old after the next step.
        self.__dict__["_running"] = None if self._buffers else vectors_of(self, acting_adapters(self))

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)  # type: ignore[misc]
        self.note_running()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.note_running()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Called before the vectors are loaded, perhaps as new parameters: graphs have to look again.
        self.__dict__["_running"] = None
        super()._load_from_state_dict(*args, **kwargs)


def speed_up_frozen(model: nn.Module) -> None:
    """Give every ``nn.Linear`` and ``Conv1D`` beside the layers with vectors :func:`linear_forward`, on CPUs.

    They are what is left of a step: queries, the attention's output, the language model's head. Whether it is the
    faster one is asked in every call: layers move, and may be trained again. :func:`give_back_frozen` undoes it.
    """
    inside = {id(layer._modules.get("base_layer")) for layer in model.modules() if is_scaled(layer)}
    if not inside or not ia3_kernels.backends.prefers_native():
        return
    for layer in model.modules():
        if type(layer) not in (nn.Linear, Conv1D) or id(layer) in inside or patching.is_replaced(layer):
            continue
        weight = layer._parameters["weight"]
        if type(weight) is nn.Parameter and weight.device.type in ("cpu", "meta"):
            patching.replace(layer, linear_forward)


def give_back_frozen(model: nn.Module) -> None:
    """Undo :func:`speed_up_frozen`."""
    for layer in model.modules():
        patching.restore(layer, (linear_forward,))
