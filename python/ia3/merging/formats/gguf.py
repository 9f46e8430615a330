"""transformers' packed GGUF blocks (``GgufLinear``). Tested with transformers 5.23 and gguf 0.19."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...patching import stand_in
from . import Format, FrozenProduct, Parts, State, wants_gradient

# Of each GGUF type that transformers keeps packed, where in a block its fp16 scales lie (and that of its minima).
# IQ1_M has none: it spreads its scale's bits over other fields.
_GGUF_FIELDS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


@stand_in
def gguf_forward(layer: Any, x: Tensor) -> Tensor:
    """Return the output ``[*, out]`` of a ``GgufLinear`` for x ``[*, in]``, with a gradient for x."""
    if not wants_gradient(x):
        own: Tensor = type(layer).forward(layer, x)
        return own
    if layer.input_permutation is not None:
        x = x.index_select(-1, layer.input_permutation)
    unpack = functools.partial(_parts, layer)

    def run(x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], layer.out_features)
        for rows, values in unpack(x.dtype):
            y[..., rows] = x @ values.T
        return y

    y: Tensor = FrozenProduct.apply(x, run, unpack)
    return y if layer.bias is None else (y + layer.bias).to(x.dtype)


def _parts(layer: Any, dtype: torch.dtype) -> Parts:
    # Here, because transformers imports its quantizers lazily, and a model with packed layers has done so.
    from transformers.integrations.gguf.kernels import DEQUANT_CHUNK_ELEMS, dequantize_blocks

    step = max(1, DEQUANT_CHUNK_ELEMS // layer.in_features)
    for start in range(0, layer.out_features, step):
        packed = layer.weight[start : start + step]
        values = dequantize_blocks(packed, layer.ggml_type, packed.shape[0], layer.in_features, dtype)
        yield slice(start, start + step), values


class GgufBlocks(Format):
    """transformers' ``GgufLinear``: a row's blocks as bytes, each with an fp16 scale (and some with one for a minimum).

    The product is rounded to those 16 bits: by 2⁻¹¹ of it, or by 2⁻²⁵ where it is below fp16's normal numbers (2⁻¹⁴),
    as the scales of K-quants often are.
    """

    layers = frozenset({"GgufLinear"})
    forward = staticmethod(gguf_forward)

    @staticmethod
    def _type(layer: Any) -> tuple[str, int, int]:
        """Return the name of its type, the values in a block, and its bytes."""
        from transformers.integrations.gguf import dequant

        number = int(layer.ggml_type)
        return dequant.GGML_NAME.get(number, str(number)), *dequant.GGML_BLOCK[number]

    def _fields(self, layer: Any) -> list[Tensor]:
        """Return the fp16 fields as views ``[out, blocks, 2]`` of the bytes."""
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
        fields = [field.contiguous().view(torch.float16) for field in self._fields(layer)]
        return {"scales": torch.stack(fields, 1)}  # [out, fields, blocks, 1]

    def write(self, layer: Any, state: State) -> None:
        if "bytes" in state:
            layer.weight.data.copy_(state["bytes"])
            return
        for field, values in zip(self._fields(layer), state["scales"].unbind(1), strict=True):
            field.copy_(values.contiguous().view(torch.uint8))

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
