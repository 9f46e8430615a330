"""The scales of quantized weights: read, multiplied row by row, and put back, without touching a code.

Each format stores codes, and a scale for every row, or for every block within a row; the value is their product (plus,
in some, an offset that has a scale of its own). Rows multiplied by a vector are therefore the same codes with their
scales multiplied. Columns are not: they share scales, and their weight has to be quantized anew, by its own library.

A format's functions take the layer, and a *state*: what merging may replace, as the library keeps it. None changes
tensors of a state, so that one read before a merge restores the layer afterwards.
"""

from __future__ import annotations

import functools
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import quantized

State = dict[str, Any]


class Format(ABC):
    """What a kind of quantized layer stores, and where.

    layers: the names of its classes; names, because they come with optional packages.
    """

    layers: ClassVar[frozenset[str]]

    @classmethod
    def holds(cls, layer: nn.Module) -> bool:
        """Whether ``layer`` is of this format."""
        return any(kind.__name__ in cls.layers for kind in type(layer).__mro__)

    @abstractmethod
    def obstacle(self, layer: Any) -> str | None:
        """Why its rows have no scales of their own; ``None`` where they have."""

    def requantize_obstacle(self, layer: Any) -> str | None:
        """Why it cannot be quantized anew; ``None`` where it can."""
        return None

    @abstractmethod
    def read(self, layer: Any, with_codes: bool = False) -> State:
        """What the layer holds now; with its codes where they are to be replaced."""

    @abstractmethod
    def write(self, layer: Any, state: State) -> None:
        """Let the layer hold a state, on the device where it is now."""

    @abstractmethod
    def scales(self, state: State) -> Tensor:
        """The scales of a state in fp32, of whatever shape, for what checks them."""

    @abstractmethod
    def scaled(self, layer: Any, state: State, rows: Tensor) -> State:
        """The state whose rows are ``rows [out]`` times those of ``state``; its codes are those of ``state``."""

    def columns(self, layer: Any, vector: Tensor) -> Tensor:
        """A vector over the layer's inputs, in the order of its columns."""
        return vector

    @abstractmethod
    def values(self, layer: Any) -> Tensor:
        """The weight ``[out, in]`` that the layer holds, in fp32."""

    @abstractmethod
    def quantize(self, layer: Any, state: State, weight: Tensor) -> State:
        """``weight [out, in]``, in fp32, quantized as ``state`` was, by the format's own library; with its codes."""


class _Int8Rows(Format):
    """bitsandbytes' ``Linear8bitLt``: int8 codes, and the largest magnitude of each row, ``SCB [out]``.

    Both are attributes of the weight until the first forward, and of ``layer.state`` afterwards.
    """

    layers = frozenset({"Linear8bitLt"})

    @staticmethod
    def _place(layer: Any) -> Any:
        return layer.state if layer.weight.SCB is None else layer.weight

    def obstacle(self, layer: Any) -> str | None:
        if layer.state.has_fp16_weights:
            return "whose weight is quantized in every forward pass (has_fp16_weights=True), and has no scales to keep"
        return "which is not quantized yet; move it to a device first" if self._place(layer).SCB is None else None

    def requantize_obstacle(self, layer: Any) -> str | None:
        return self.obstacle(layer)

    def read(self, layer: Any, with_codes: bool = False) -> State:
        state = {"scales": self._place(layer).SCB}
        return state | ({"codes": layer.weight.data} if with_codes else {})

    def write(self, layer: Any, state: State) -> None:
        place, device = self._place(layer), layer.weight.device
        place.SCB = state["scales"].to(device)
        if "codes" in state:
            layer.weight.data = place.CB = state["codes"].to(device)

    def scales(self, state: State) -> Tensor:
        found: Tensor = state["scales"].float()
        return found

    def scaled(self, layer: Any, state: State, rows: Tensor) -> State:
        scales = state["scales"]
        return {"scales": (scales.to(rows.dtype) * rows.to(scales.device)).to(scales.dtype)}

    def values(self, layer: Any) -> Tensor:
        return layer.weight.data.float() * (self._place(layer).SCB.float() / 127)[:, None]  # type: ignore[no-any-return]

    def quantize(self, layer: Any, state: State, weight: Tensor) -> State:
        from bitsandbytes import functional

        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return {"scales": scales, "codes": codes}


class _FourBitBlocks(Format):
    """bitsandbytes' ``Linear4bit``: NF4 or FP4 codes, and the largest magnitude of each block of a flattened weight.

    These magnitudes (``absmax``, fp32) may be quantized themselves; scaled ones are not, which costs 3 bytes a block.
    On CPUs with AVX-512 BF16 an evaluation changes the layout of both, and rounds the magnitudes to bf16.
    """

    layers = frozenset({"Linear4bit"})

    def obstacle(self, layer: Any) -> str | None:
        state = layer.weight.quant_state
        if state is None:
            return "which is not quantized yet; move it to a device first"
        if len(state.shape) != 2 or state.shape[1] % state.blocksize:
            return (
                f"whose rows of {layer.in_features} values are not whole blocks of {state.blocksize}, so that a scale "
                "belongs to more than one row"
            )
        return None

    def requantize_obstacle(self, layer: Any) -> str | None:
        return "which is not quantized yet; move it to a device first" if layer.weight.quant_state is None else None

    def read(self, layer: Any, with_codes: bool = False) -> State:
        state: State = vars(layer.weight.quant_state) | ({"codes": layer.weight.data} if with_codes else {})
        return state

    def write(self, layer: Any, state: State) -> None:
        weight, is_packed = layer.weight, state.get("packing_format_for_cpu", False)
        fields = {name: value for name, value in state.items() if name != "codes"}
        codes = state.get("codes")
        if codes is None and is_packed != getattr(weight.quant_state, "packing_format_for_cpu", False):
            codes = _packed_codes(layer, state) if is_packed else _flat_codes(layer)
        if codes is not None:
            weight.data = codes.to(weight.device)
        # The object stays: the layer and its weight share it.
        vars(weight.quant_state).clear()
        vars(weight.quant_state).update(fields)
        if fields.get("state2") is not None:
            weight.quant_state.state2 = _copy_of(fields["state2"])
        weight.quant_state.to(weight.device)

    def scales(self, state: State) -> Tensor:
        found: Tensor = _flat(state)["absmax"]
        return found

    def scaled(self, layer: Any, state: State, rows: Tensor) -> State:
        flat = _flat(state)
        absmax = flat["absmax"].view(flat["shape"][0], -1)
        return flat | {"absmax": (absmax * rows.to(absmax.device)[:, None]).float().view(-1)}

    def values(self, layer: Any) -> Tensor:
        from bitsandbytes import functional

        flat = _flat(vars(layer.weight.quant_state))
        values: Tensor = functional.dequantize_4bit(_flat_codes(layer), _state_of(flat | {"dtype": torch.float32}))
        return values

    def quantize(self, layer: Any, state: State, weight: Tensor) -> State:
        from bitsandbytes import functional

        codes, quantized_state = functional.quantize_4bit(
            weight,
            blocksize=state["blocksize"],
            compress_statistics=layer.weight.compress_statistics,
            quant_type=state["quant_type"],
            quant_storage=layer.weight.quant_storage,
        )
        fields: State = vars(quantized_state)
        return fields | {"dtype": _flat(state)["dtype"], "codes": codes}


def _state_of(fields: State) -> Any:
    """bitsandbytes' object with these fields."""
    from bitsandbytes.functional import QuantState

    state = QuantState.__new__(QuantState)
    vars(state).update(fields)
    return state


def _copy_of(state: Any) -> Any:
    return _state_of(vars(state))


def _flat(fields: State) -> State:
    """The fields of a 4-bit weight's state with its scales in fp32, one after the other, whatever they were."""
    flat = {name: value for name, value in fields.items() if not name.startswith("original_")}
    flat.pop("packing_format_for_cpu", None)
    flat.pop("codes", None)
    if fields.get("packing_format_for_cpu", False):
        absmax, flat["dtype"] = fields["absmax"].T.reshape(-1), fields["original_dtype"]
    elif fields["nested"]:
        from bitsandbytes import functional

        absmax = functional.dequantize_blockwise(fields["absmax"], fields["state2"]) + fields["offset"]
    else:
        absmax = fields["absmax"]
    return flat | {"absmax": absmax.float(), "nested": False, "offset": None, "state2": None}


def _flat_codes(layer: Any) -> Tensor:
    """The codes in the layout in which they were quantized."""
    from bitsandbytes import functional

    weight = layer.weight
    data: Tensor = weight.data
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return data
    # Not nested: it would quantize the scales anew, which are not asked for.
    state = _state_of(vars(weight.quant_state) | {"original_nested": False})
    codes: Tensor = functional._convert_weight_packed_for_cpu_inverse(data, state)[0]
    return codes


def _packed_codes(layer: Any, state: State) -> Tensor:
    """The codes in the layout of CPUs, from the one in which they were quantized."""
    from bitsandbytes import functional

    codes: Tensor = functional._convert_weight_packed_for_cpu(layer.weight.data, _state_of(_flat(state)))[0]
    return codes


class _TorchaoInt8(Format):
    """torchao's ``Int8Tensor``, the weight of a plain ``nn.Linear``: int8 codes, and a scale for each row or group."""

    layers = frozenset()

    @classmethod
    def holds(cls, layer: nn.Module) -> bool:
        return type(layer) is nn.Linear and type(layer._parameters.get("weight")).__name__ == "Int8Tensor"

    def obstacle(self, layer: Any) -> str | None:
        scale = layer.weight.scale
        if scale.dim() != 2 or scale.shape[0] != layer.out_features:
            return f"whose scales of shape {list(scale.shape)} are not one or more for each of its rows"
        return None

    def requantize_obstacle(self, layer: Any) -> str | None:
        return None if list(layer.weight.block_size) == [1, layer.in_features] else "whose scales are not one for a row"

    def read(self, layer: Any, with_codes: bool = False) -> State:
        weight = layer.weight
        codes = {"codes": weight.qdata, "zero_point": weight.zero_point} if with_codes else {}
        return {"scales": weight.scale} | codes

    def write(self, layer: Any, state: State) -> None:
        weight = layer.weight
        device = weight.qdata.device
        weight.scale = state["scales"].to(device)
        if "codes" in state:
            weight.qdata = state["codes"].to(device)
            weight.zero_point = None if state["zero_point"] is None else state["zero_point"].to(device)

    def scales(self, state: State) -> Tensor:
        found: Tensor = state["scales"].float()
        return found

    def scaled(self, layer: Any, state: State, rows: Tensor) -> State:
        scales = state["scales"]
        return {"scales": (scales.to(rows.dtype) * rows.to(scales.device)[:, None]).to(scales.dtype)}

    def values(self, layer: Any) -> Tensor:
        values: Tensor = layer.weight.dequantize(torch.float32)
        return values

    def quantize(self, layer: Any, state: State, weight: Tensor) -> State:
        from torchao.quantization import PerRow
        from torchao.quantization.quant_primitives import MappingType

        zero_point = layer.weight.zero_point
        is_symmetric = zero_point is None or not bool(zero_point.any())
        mapping = MappingType.SYMMETRIC if is_symmetric else MappingType.ASYMMETRIC
        new = type(layer.weight).from_hp(weight, PerRow(), mapping, reduce_range=layer.weight.reduce_range)
        return {"scales": new.scale, "codes": new.qdata, "zero_point": new.zero_point}


# Of each GGUF type that transformers keeps packed, where in a block its fp16 scales lie (and that of its minima).
# IQ1_M has none: it spreads its scale's bits over other fields.
_GGUF_FIELDS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
}


class _GgufBlocks(Format):
    """transformers' ``GgufLinear``: a row's blocks as bytes, each with an fp16 scale (and some with one for a minimum).

    The product is rounded to those 16 bits: by 2⁻¹¹ of it, or by 2⁻²⁵ where it is below fp16's normal numbers (2⁻¹⁴),
    as the scales of K-quants often are.
    """

    layers = frozenset({"GgufLinear"})

    @staticmethod
    def _type(layer: Any) -> tuple[str, int, int]:
        """The name of its type, the values in a block, and its bytes."""
        from transformers.integrations.gguf import dequant

        number = int(layer.ggml_type)
        return dequant.GGML_NAME.get(number, str(number)), *dequant.GGML_BLOCK[number]

    def _fields(self, layer: Any) -> list[Tensor]:
        """The fp16 fields as views ``[out, blocks, 2]`` of the bytes."""
        name, _, size = self._type(layer)
        blocks = layer.weight.data.view(layer.out_features, -1, size)
        return [blocks[:, :, start : start + 2] for start in _GGUF_FIELDS[name]]

    def obstacle(self, layer: Any) -> str | None:
        name = self._type(layer)[0]
        return None if name in _GGUF_FIELDS else f"whose type {name} has no field for a block's scale"

    def requantize_obstacle(self, layer: Any) -> str | None:
        name = self._type(layer)[0]
        try:
            from gguf import GGMLQuantizationType, quants

            quants.quantize(torch.zeros(1, self._type(layer)[1]).numpy(), GGMLQuantizationType(int(layer.ggml_type)))
        except ImportError:
            return "and the package gguf is not installed"
        except NotImplementedError:
            return f"and the package gguf cannot quantize to {name}"
        return None

    def read(self, layer: Any, with_codes: bool = False) -> State:
        if with_codes:
            return {"bytes": layer.weight.data.clone()}
        return {"fields": torch.stack([field.contiguous().view(torch.float16) for field in self._fields(layer)])}

    def write(self, layer: Any, state: State) -> None:
        if "bytes" in state:
            layer.weight.data.copy_(state["bytes"])
            return
        for field, values in zip(self._fields(layer), state["fields"], strict=True):
            field.copy_(values.view(torch.uint8))

    def scales(self, state: State) -> Tensor:
        found: Tensor = state["fields"].float()
        return found

    def scaled(self, layer: Any, state: State, rows: Tensor) -> State:
        fields = state["fields"]  # [fields, out, blocks, 1]
        return {"fields": (fields.to(rows.dtype) * rows.to(fields.device)[:, None, None]).half()}

    def columns(self, layer: Any, vector: Tensor) -> Tensor:
        order = layer.input_permutation
        return vector if order is None else vector[order]

    def values(self, layer: Any) -> Tensor:
        from transformers.integrations.gguf.dequant import dequantize

        values: Tensor = dequantize(layer.weight.data, layer.ggml_type, torch.float32)
        return values.view(layer.out_features, -1)

    def quantize(self, layer: Any, state: State, weight: Tensor) -> State:
        from gguf import GGMLQuantizationType, quants

        packed = quants.quantize(weight.cpu().numpy(), GGMLQuantizationType(int(layer.ggml_type)))
        return {"bytes": torch.from_numpy(packed)}


_FORMATS: tuple[Format, ...] = (_Int8Rows(), _FourBitBlocks(), _TorchaoInt8(), _GgufBlocks())


def format_of(layer: nn.Module) -> Format | None:
    """The format of a quantized layer, or ``None``."""
    return next((known for known in _FORMATS if known.holds(layer)), None)


def is_bare(layer: nn.Module) -> bool:
    """Whether calling a quantized ``layer`` does no more than its library's ``forward``, or ours in its place.

    The hooks by which accelerate moves inputs to a layer's device leave its values alone, and are let pass.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if nn_module._has_any_global_hook():
        return False
    hook = layer.__dict__.get("_hf_hook")
    if hook is None:
        return _is_own(layer, layer.__dict__.get("forward"))
    is_aligning = type(hook).__name__ == "AlignDevicesHook" and not hook.offload
    return is_aligning and _is_own(layer, layer.__dict__.get("_old_forward"))


def _is_own(layer: nn.Module, forward: Callable[..., Any] | None) -> bool:
    if isinstance(forward, functools.partial):
        return forward.func in (quantized.gguf_forward, quantized.bnb_4bit_forward)
    return forward is None or (isinstance(forward, types.MethodType) and forward.__func__ is type(layer).forward)
