"""bitsandbytes: int8 rows (``Linear8bitLt``) and 4-bit blocks (``Linear4bit``). Tested with 0.50."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...patching import stand_in
from . import Format, FrozenProduct, Parts, State, wants_gradient

_UNQUANTIZED = "which is not quantized yet; move it to a device first"


class Int8Rows(Format):
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
        return _UNQUANTIZED if self._place(layer).SCB is None else None

    def read(self, layer: Any, with_codes: bool = False) -> State:
        state = {"scales": self._place(layer).SCB}
        return state | ({"codes": layer.weight.data} if with_codes else {})

    def write(self, layer: Any, state: State) -> None:
        place, device = self._place(layer), layer.weight.device
        place.SCB = state["scales"].to(device)
        if "codes" in state:
            layer.weight.data = place.CB = state["codes"].to(device)

    def values(self, layer: Any) -> Tensor:
        return layer.weight.data.float() * (self._place(layer).SCB.float() / 127)[:, None]  # type: ignore[no-any-return]

    def quantize(self, layer: Any, state: State, weight: Tensor) -> State:
        from bitsandbytes import functional

        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return {"scales": scales, "codes": codes}


@stand_in
def linear4bit_forward(layer: Any, x: Tensor) -> Tensor:
    """Return the output ``[*, out]`` of a ``Linear4bit`` for x ``[*, in]``, with a gradient for x in either layout."""
    run = functools.partial(type(layer).forward, layer)
    y: Tensor
    if wants_gradient(x) and getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        y = FrozenProduct.apply(x, run, functools.partial(_parts, layer))
    else:
        y = run(x)
    return y


def _parts(layer: Any, dtype: torch.dtype) -> Parts:
    yield slice(None), _values(layer, dtype)


def _values(layer: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional

    state = _state_of(_flat(vars(layer.weight.quant_state)) | {"dtype": dtype})
    values: Tensor = functional.dequantize_4bit(_flat_codes(layer), state)
    return values


class FourBitBlocks(Format):
    """bitsandbytes' ``Linear4bit``: NF4 or FP4 codes, and the largest magnitude of each block of a flattened weight.

    These magnitudes (``absmax``, fp32) may be quantized themselves; scaled ones are not, which costs 3 bytes a block.
    On CPUs with AVX-512 BF16 an evaluation changes the layout of both, and rounds the magnitudes to bf16.
    """

    layers = frozenset({"Linear4bit"})
    forward = staticmethod(linear4bit_forward)

    def obstacle(self, layer: Any) -> str | None:
        state = layer.weight.quant_state
        if state is None:
            return _UNQUANTIZED
        if len(state.shape) != 2 or state.shape[1] % state.blocksize:
            return (
                f"whose rows of {layer.in_features} values are not whole blocks of {state.blocksize}, so that a scale "
                "belongs to more than one row"
            )
        return None

    def requantize_obstacle(self, layer: Any) -> str | None:
        return _UNQUANTIZED if layer.weight.quant_state is None else None

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
            weight.quant_state.state2 = _state_of(vars(fields["state2"]))
        weight.quant_state.to(weight.device)

    def scales(self, state: State) -> Tensor:
        found: Tensor = _flat(state)["absmax"]
        return found

    def scaled(self, layer: Any, state: State, rows: Tensor) -> State:
        flat = _flat(state)
        absmax = flat["absmax"].view(flat["shape"][0], -1)
        return flat | {"absmax": (absmax * rows.to(absmax.device)[:, None]).float().view(-1)}

    def values(self, layer: Any) -> Tensor:
        return _values(layer, torch.float32)

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


def _flat(fields: State) -> State:
    """Return the fields of a 4-bit weight's state with its scales in fp32, one after the other, whatever they were."""
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
    """Return the codes in the layout in which they were quantized."""
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
    """Return the codes in the layout of CPUs, from the one in which they were quantized."""
    from bitsandbytes import functional

    codes: Tensor = functional._convert_weight_packed_for_cpu(layer.weight.data, _state_of(_flat(state)))[0]
    return codes
