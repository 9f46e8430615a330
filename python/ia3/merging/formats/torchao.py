"""torchao's ``Int8Tensor``, the weight of a plain ``nn.Linear``. Tested with torchao 0.18."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import Format, State


class TorchaoInt8(Format):
    """torchao's ``Int8Tensor``, the weight of a plain ``nn.Linear``: int8 codes, and a scale for each row or group."""

    layers = frozenset()

    @classmethod
    def holds(cls, layer: type, weight: type) -> bool:
        return layer is nn.Linear and weight.__name__ == "Int8Tensor"

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
