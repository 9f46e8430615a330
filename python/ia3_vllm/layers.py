"""vLLM's layers with a table of vectors for each scaled side: one row a slot, and a last one of ones.

A class is vLLM's own with-LoRA class of the same kind, whose slicing among tensor-parallel ranks serves as it is: a
vector ``ia3_l`` has the shape of a matrix of rank 1, ``[1, in]`` like ``lora_a`` and ``[out, 1]`` like ``lora_b``.

Equation, T tokens of slots i: ``y = (x ∘ a[i]) Wᵀ ∘ b[i]``, with a ``[slots + 1, in]``, b ``[slots + 1, out]``. A slot
of -1 is the last row. There is no branch on what a batch holds, so a graph is the same for every mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.lora import layers as theirs
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from ia3.errors import IA3Error
from ia3_kernels import gated_activation, scaled_activation

Vectors = Sequence[Tensor | None]


def scale_rows(x: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Return ``x ∘ table[index]``, in fp32 with one rounding: x ``[*, n]``, table ``[slots + 1, n]``, index ``[*]``."""
    if torch.compiler.is_compiling():  # a compiler fuses this with what is around it
        return (x.float() * table[index]).to(x.dtype)
    return scaled_activation(x, table, "identity", index)


class Scaled:
    """What IA3 adds to a layer with LoRA; mixed into vLLM's classes by :func:`layer_classes`."""

    with_lora = False
    output_table: Tensor | None = None

    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        if self.with_lora:
            # vLLM's torch kernels read the last slot for a token without an adapter: here, one that stays zeros.
            spare = int(self.device.type == "cpu")
            super().create_lora_weights(max_loras + spare, lora_config, model_config)  # type: ignore[misc]
        else:
            self.lora_config, self._enable_aux_cuda_stream = lora_config, False
        self.slots, self.input_tables = max_loras, [None] * self.n_slices
        self.is_split = self.input_is_scaled = False  # the second: by the activation before

    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        super().set_mapping(punica_wrapper)  # type: ignore[misc]
        self.index = getattr(punica_wrapper, "slot_index", punica_wrapper)
        self.register_buffer("ia3_index", self.index.buffer, persistent=False)

    def reset_lora(self: Any, index: int) -> None:
        if self.with_lora:
            super().reset_lora(index)  # type: ignore[misc]
        for table in (*self.input_tables, self.output_table):
            if table is not None:
                table[index].fill_(1)

    def apply(self: Any, x: Tensor, bias: Tensor | None = None) -> Any:
        if self.is_split:
            y = self._apply_split(x, bias)
        else:
            table = self.input_tables[0]
            if table is not None and not self.input_is_scaled:
                x = scale_rows(x, table, self.index.rows(x))
            y = super().apply(x, bias)  # type: ignore[misc]
        if self.output_table is None:
            return y
        start, stop = self.span
        part = y[..., start:stop]
        scaled = scale_rows(part, self.output_table, self.index.rows(y))
        if part.shape == y.shape:
            return scaled
        part.copy_(scaled)
        return y

    def _apply_lora_to_output(self: Any, x: Tensor, output: Tensor) -> Any:
        return super()._apply_lora_to_output(x, output) if self.with_lora else output  # type: ignore[misc]

    def _apply_split(self: Any, x: Tensor, bias: Tensor | None) -> Any:
        """One matmul for each of the fused layers, whose inputs differ."""
        rows, parts, stops = self.index.rows(x), [], list(accumulate(self.widths))
        for table, width, stop in zip(self.input_tables, self.widths, stops, strict=True):
            scaled = x if table is None else scale_rows(x, table, rows)
            own = None if bias is None else bias[stop - width : stop]
            parts.append(F.linear(scaled, self.base_layer.weight[stop - width : stop], own))
        return self._apply_lora_to_output(x, torch.cat(parts, -1))

    @property
    def widths(self: Any) -> tuple[int, ...]:
        """The outputs of each fused layer on this rank."""
        return tuple(self.output_slices) if self.n_slices > 1 else (self.output_size,)

    def whole_sizes(self: Any) -> tuple[int, list[int]]:
        """Return the inputs and, for each fused layer, the outputs of the layer that ranks have slices of."""
        base, copies = self.base_layer, getattr(self.base_layer, "num_kv_head_replicas", 1)
        first, *others = getattr(base, "output_sizes", None) or [base.output_size]
        sizes = [first, *(size // copies for size in others)]  # vLLM counts every copy of a head of keys and values
        return base.input_size, sizes if self.n_slices > 1 else [sum(sizes)]

    def create_tables(self: Any, name: str, outputs: list[bool], inputs: list[bool], dtype: torch.dtype) -> None:
        """Make tables of ones for the sides that are scaled, a flag for each fused layer. Raises :class:`IA3Error`."""
        base = self.base_layer
        if len(outputs) != self.n_slices:
            raise IA3Error(
                f"{name} holds {self.n_slices} layers under {len(outputs)} names, so that no vector of a checkpoint "
                "has a place in it; leave it out of the targets."
            )
        if any(inputs):
            self.is_split = self.n_slices > 1
            plain = isinstance(base.quant_method, UnquantizedLinearMethod)
            if self.is_split and not (plain and base.weight.shape[:1] == (sum(self.widths),)):
                raise IA3Error(
                    f"the input of layers fused in {name} is to be scaled, which takes a matmul for each of them, and "
                    "the weight cannot be split: it is quantized, or packed for this CPU; scale outputs there."
                )
            sizes = [self.input_size if wanted else 0 for wanted in inputs]
            self.input_tables = [self._ones(f"inputs{i}", size, dtype) for i, size in enumerate(sizes)]
        if any(outputs):
            if base.skip_bias_add and base.bias is not None:
                raise IA3Error(f"{name} leaves its bias to others, who do not scale it; leave it out of the targets.")
            first, last = outputs.index(True), len(outputs) - outputs[::-1].index(True)
            stops = [0, *accumulate(self.widths)]
            self.span, self.parts = (stops[first], stops[last]), slice(first, last)
            self.output_table = self._ones("outputs", stops[last] - stops[first], dtype)

    def _ones(self: Any, name: str, size: int, dtype: torch.dtype) -> Tensor | None:
        if not size:
            return None
        table = torch.ones(self.slots + 1, size, dtype=dtype, device=self.device)
        self.register_buffer(f"ia3_{name}", table, persistent=False)  # which vLLM keeps while it sleeps
        return table

    def shard(self: Any, outputs: Vectors, inputs: Vectors) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return this rank's slices of the whole vectors of each fused layer, as :meth:`set_scales` takes them.

        outputs: ``[out, 1]`` or None, inputs: ``[1, in]`` or None; for each fused layer.
        """
        if self.n_slices > 1:
            left, right = self.slice_lora_a(list(inputs)), self.slice_lora_b(list(outputs))
        else:
            left = [None if vector is None else self.slice_lora_a(vector) for vector in inputs]
            right = [None if vector is None else self.slice_lora_b(vector) for vector in outputs]
        own = None
        if any(vector is not None for vector in right):
            pairs = list(zip(right, self.widths, strict=True))[self.parts]
            own = torch.cat([torch.ones(width) if part is None else part.reshape(-1) for part, width in pairs])
        return own, [None if vector is None else vector.reshape(-1) for vector in left]

    def set_scales(self: Any, slot: int, output: Tensor | None, inputs: Vectors) -> None:
        """Write an adapter's vectors into a slot, in which :meth:`reset_lora` has put ones."""
        if output is not None:
            self.output_table[slot].copy_(output, non_blocking=True)
        for table, vector in zip(self.input_tables, inputs, strict=True):
            if vector is not None:
                table[slot].copy_(vector, non_blocking=True)


def layer_classes(with_lora: bool) -> tuple[type, ...]:
    """Return the classes that replace vLLM's, in the order in which they are asked what they fit."""
    kinds = (
        theirs.ColumnParallelLinearWithLoRA,
        theirs.MergedColumnParallelLinearWithLoRA,
        theirs.QKVParallelLinearWithLoRA,
        theirs.MergedQKVParallelLinearWithLoRA,
        theirs.RowParallelLinearWithLoRA,
        theirs.ReplicatedLinearWithLoRA,
    )
    return tuple(type(kind.__name__.replace("LoRA", "IA3"), (Scaled, kind), {"with_lora": with_lora}) for kind in kinds)


class ScaledActivation(nn.Module):
    """A gated MLP's activation that scales for the layer behind it: ``act(gate) ∘ up ∘ a[i]`` in one kernel."""

    def __init__(self, activation: str, behind: Any) -> None:
        super().__init__()
        self._activation, self._behind = activation, [behind]  # in a list, or it would be a child here too

    def forward(self, x: Tensor) -> Tensor:
        behind, half = self._behind[0], x.shape[-1] // 2
        gate, up = x[..., :half], x[..., half:]
        return gated_activation(gate, up, behind.input_tables[0], self._activation, behind.index.rows(x))


def _name_of(module: nn.Module) -> str | None:
    """Return this package's name of a gated activation of vLLM's; None for every other module."""
    gelu = "gelu_tanh" if getattr(module, "approximate", None) == "tanh" else "gelu"
    return {SiluAndMul: "silu", GeluAndMul: gelu}.get(type(module))


def move_into_activation(parent: nn.Module, behind: Any, dtype: torch.dtype) -> bool:
    """Let a block's activation scale the input of ``behind``, its last layer; returns whether it does.

    Whether the block is one whose activation feeds that layer, and nothing else, is tried on a few numbers.
    """
    found = [(name, child, kind) for name, child in parent.named_children() if (kind := _name_of(child)) is not None]
    entry: Any = next((child for child in parent.children() if getattr(child, "input_size", None)), behind)
    table = behind.input_tables[0]
    if len(found) != 1 or table is None or entry is behind:
        return False
    ((name, plain, kind),) = found
    random = torch.Generator().manual_seed(0)  # every rank's own, and the same
    x = torch.randn(3, entry.input_size, generator=random).to(dtype)
    table[0].copy_(torch.rand(table.shape[1], generator=random) + 0.5)
    behind.index.buffer[:3] = torch.tensor([0, -1, 0])
    try:
        expected = parent(x)
        setattr(parent, name, ScaledActivation(kind, behind))
        behind.input_is_scaled = True
        error = (parent(x).float() - expected.float()).abs().max()
        fits = bool(error <= 16 * torch.finfo(dtype).eps * expected.float().abs().max())
    except Exception:  # a block that is called otherwise
        fits = False
    table[0].fill_(1)
    behind.index.buffer.fill_(-1)
    behind.input_is_scaled = fits
    if not fits:
        setattr(parent, name, plain)
    return fits
