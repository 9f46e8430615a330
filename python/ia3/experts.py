"""Experts whose weights are three-dimensional parameters: the layers that scale them, and the computation.

transformers computes experts in functions that its registry knows by name (``experts_implementation``), and that call
the experts' own ``_apply_gate`` between the two products. They run as they are, on a view of the experts whose
``_apply_gate`` multiplies by each row's vector: what is biased, interleaved or clamped stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from ia3_kernels import gated_activation, scaled_activation

from . import patching
from .blocks import activation_name
from .errors import IA3Error
from .layers import Wrapper, effective_scale, is_untouched, refuse_training

DOWN = "down_proj"
# Implementations whose order of rows is known here.
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# Experts that get a block of rows each, [experts * tokens, hidden], and run in no implementation of the registry.
BLOCKWISE = frozenset({"Llama4TextExperts"})

Scales = Mapping[str, tuple[Tensor, Tensor | None]]


class _Renamed(dict[str, Any]):
    """The parameters of an experts module under a layer's names."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        self.experts, self.names = experts, {"weight": name, "bias": f"{name}_bias"}

    def __contains__(self, key: object) -> bool:
        return self.names.get(str(key)) in self.experts._parameters

    def __getitem__(self, key: str) -> Any:
        return self.experts._parameters[self.names[key]]

    def get(self, key: str, default: Any = None) -> Any:
        return self.experts._parameters.get(self.names[key], default)

    def __setitem__(self, key: str, value: Any) -> None:
        self.experts._parameters[self.names[key]] = value


class ExpertsMatrix(nn.Module):
    """One parameter of an experts module as the layer that vectors scale: its ``weight`` ``[experts, ., .]``, ``bias``.

    is_input: its vectors scale inputs, ``[experts, 1, n]`` (the down projection); else outputs, ``[experts, n, 1]``.
    dim: what a vector scales of the weight as :meth:`as_stored` shows it: 0, the rows; 1, the columns of each group.
    """

    def __init__(self, experts: Any, name: str) -> None:
        super().__init__()
        self.experts: Any
        self.__dict__["experts"] = experts  # not a child: it stands in the model already
        self.__dict__["_parameters"] = _Renamed(experts, name)
        self.is_input = name == DOWN
        is_transposed = getattr(experts, "is_transposed", True)
        count, *sides = experts._parameters[name].shape
        size = sides[0 if self.is_input == is_transposed else 1]
        self.vector_shape = (count, 1, size) if self.is_input else (count, size, 1)
        self.in_features = self.out_features = count * size
        self.dim = int(self.is_input != is_transposed)

    def as_stored(self, parameter: Tensor) -> Tensor:
        """Return a view of the weight as that of a grouped convolution, a group for each expert; of a bias, flat."""
        values = parameter.detach()
        return values.view(-1, values.shape[-1], 1) if values.dim() == 3 else values.view(-1)

    def runs(self) -> tuple[str, str]:
        """Return the operator that multiplies by the vectors, and why it is that one."""
        kind = type(self.experts).__name__
        if not self.is_input:
            return "scaled_activation", f"on the product of {kind}"
        if _kernel_activation(self.experts) is None:
            return "scaled_activation", f"{kind} computes its own gate"
        has_gate = getattr(self.experts, "has_gate", True)
        return "gated_activation" if has_gate else "scaled_activation", f"fused into the activation of {kind}"


class Experts(Wrapper):
    """Experts (``base_layer``) and, under the names of their parameters, the layers that hold the vectors."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = experts
        self.training = experts.training

    def layers(self) -> dict[str, Any]:
        """Return what holds the vectors, by the names of the parameters."""
        return {name: layer for name, layer in self._modules.items() if name != "base_layer"}

    def forward(self, *args: Any, **named: Any) -> Any:
        x: Tensor = args[0] if args else next(iter(named.values()))
        if type(self.base_layer).__name__ in BLOCKWISE:
            x = x[: x.shape[0] // self.base_layer.num_experts]  # the first expert's block: every token once
        scales = {}
        for name, layer in self.layers().items():
            scale, index = effective_scale(layer, x)
            if scale is not None:
                scales[name] = scale, index
        y = self.base_layer(*args, scales=scales, **named) if scales else self.base_layer(*args, **named)
        for layer in self.layers().values():
            y = refuse_training(layer, y)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with ExitStack() as unmerged:  # as layers do it for weights inside of them
            for layer in self.layers().values():
                unmerged.enter_context(layer.unmerged())
            return super()._apply(fn, recurse)


# --- the computation ------------------------------------------------------------------------------------------------


class _View:
    """Experts whose activation between the two products is another function; everything else is theirs."""

    def __init__(self, experts: Any, activate: Callable[[Tensor], Tensor]) -> None:
        self.experts = experts
        self._apply_gate = self.act_fn = activate

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


def experts_forward(experts: Any, *args: Any, scales: Any = None, **named: Any) -> Any:
    """Compute what the class of ``experts`` does, each row's activations multiplied by its expert's vector.

    scales: by parameter ``[experts, n]`` with None, or ``[adapters, experts * n]`` with each token's adapter
        ``[tokens]``; None: nothing.
    """
    if scales is None:
        return type(experts).forward(experts, *args, **named)
    inputs, count = (*args, *named.values()), experts.num_experts
    tokens: Tensor | None = None
    if type(experts).__name__ in BLOCKWISE:
        x = inputs[0].view(count, -1, inputs[0].shape[-1])
        ids = torch.arange(count, dtype=torch.int32, device=x.device).repeat_interleave(x.shape[1])
        tokens = torch.arange(x.shape[1], device=x.device).repeat(count)
        hidden = _activate(experts, scales, ids, tokens, torch.bmm(x, experts.gate_up_proj).flatten(0, 1))
        return torch.bmm(hidden.view(count, x.shape[1], -1), experts.down_proj).flatten(0, 1)
    name, index = implementation_of(experts), inputs[1]
    # The order of the implementation's rows: by token, or sorted by expert as the registry's function sorts them.
    ids = index.reshape(-1)
    ids, order = (ids, None) if name == "batched_mm" else ids.sort()
    ids = ids.to(torch.int32)
    if any(adapter is not None for _, adapter in scales.values()):
        order = torch.arange(len(ids), device=ids.device) if order is None else order
        tokens = order // index.shape[-1]
    view = _View(experts, lambda rows: _activate(experts, scales, ids, tokens, rows))
    if name == "eager":
        return _one_by_one(view, *inputs[:3], ids, order)  # type: ignore[call-arg]
    return moe.ALL_EXPERTS_FUNCTIONS[name](view, *inputs)


def _activate(experts: Any, scales: Scales, ids: Tensor, tokens: Tensor | None, rows: Tensor) -> Tensor:
    """Compute the input of the down projection from the up projection's output ``rows [S, n]``, scaled on both sides.

    ids, tokens: each row's expert and, where rows have adapters of their own, token, ``[S]``.
    """

    def scale_of(name: str) -> tuple[Tensor | None, Tensor | None]:
        if name not in scales:
            return None, None
        scale, adapter = scales[name]
        entries = scale.numel() if adapter is None else scale.shape[1]
        matrix = scale.reshape(-1, entries // experts.num_experts)
        if adapter is None:
            return matrix, ids
        chosen = adapter[tokens]
        return matrix, torch.where(chosen < 0, chosen, chosen * experts.num_experts + ids)

    has_gate = getattr(experts, "has_gate", True)
    out, index = scale_of("gate_up_proj" if has_gate else "up_proj")
    if out is not None:
        rows = scaled_activation(rows, out, "identity", index)
    scale, index = scale_of(DOWN)
    activation = _kernel_activation(experts)
    if activation is None:
        hidden: Tensor = experts._apply_gate(rows) if has_gate else experts.act_fn(rows)
        return hidden if scale is None else scaled_activation(hidden, scale, "identity", index)
    if has_gate:
        gate, up = rows.chunk(2, dim=-1)
        return gated_activation(gate, up, scale, activation, index)
    return scaled_activation(rows, scale, activation, index)


def _kernel_activation(experts: Any) -> str | None:
    """Return the kernels' name of the activation; None where it is another, or the gate computes something else."""
    gate = getattr(type(experts), "_apply_gate", None)
    is_plain = gate is None or (gate.__module__ == moe.__name__ and "_apply_gate" not in experts.__dict__)
    activation = getattr(experts, "act_fn", None)
    if not is_plain or (isinstance(activation, nn.Module) and not is_untouched(activation)):
        return None
    return activation_name(activation)


def _one_by_one(view: Any, x: Tensor, index: Tensor, weights: Tensor, ids: Tensor, order: Tensor) -> Tensor:
    """Compute the experts one after the other; what an implementation in the registry takes, and its sorted rows."""
    counts = torch.bincount(ids, minlength=view.num_experts).tolist()

    def project(rows: Tensor, name: str) -> Tensor:
        matrices, parts = getattr(view, name), []
        for expert, part in enumerate(rows.split(counts)):
            matrix = matrices[expert] if view.is_transposed else matrices[expert].t()
            bias = getattr(view, f"{name}_bias")[expert] if view.has_bias else None
            if part.shape[0]:
                parts.append(part @ matrix if bias is None else torch.addmm(bias, part, matrix))
        return torch.cat(parts) if parts else rows.new_zeros(0, matrix.shape[1])

    hidden = view._apply_gate(project(x[order // index.shape[-1]], "gate_up_proj" if view.has_gate else "up_proj"))
    y = project(hidden, DOWN)
    if getattr(view, "has_post_expert_norm", False):
        y = view.post_expert_norm(y)
    y = y * weights.reshape(-1)[order, None]
    return y[order.argsort()].view(*index.shape, -1).sum(1).to(x.dtype)


def implementation_of(experts: Any) -> str:
    """Return the name of the implementation that transformers runs; raises :class:`IA3Error` for an unknown one."""
    name = getattr(experts.config, "_experts_implementation", None) or "eager"
    if name not in _IMPLEMENTATIONS:
        raise IA3Error(
            f"experts_implementation is {name!r}, whose order of rows is not known here; load the model with one of "
            f"{', '.join(_IMPLEMENTATIONS)}, or call its set_experts_implementation."
        )
    return str(name)


def patch(model: nn.Module) -> None:
    """Let the experts of ``model`` that have vectors run :func:`experts_forward`."""
    for module in model.modules():
        if isinstance(module, Experts) and not patching.is_replaced(module.base_layer):
            patching.replace(module.base_layer, experts_forward)


def give_back(model: nn.Module) -> None:
    """Undo :func:`patch`."""
    for module in model.modules():
        if isinstance(module, Experts):
            patching.restore(module.base_layer, (experts_forward,))


def wrap(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer``, which is to hold the vectors of the experts' parameter ``path``, where it belongs."""
    outer, _, name = path.rpartition(".")
    experts = model.get_submodule(outer)
    if not isinstance(experts, Experts):
        experts = Experts(experts)
        model.set_submodule(outer, experts)
    experts._modules[name] = layer  # add_module finds a parameter of this name in what the experts pass on


def unwrap(model: nn.Module) -> None:
    """Put experts back in the place of those with vectors."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(path, module.base_layer)
