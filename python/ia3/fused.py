"""Keys and values of a fused projection alone, as the paper has them: where the queries' outputs lie.

A vector keeps the shape that PEFT gives it. Where it would scale queries it acts as one, gets no gradient, and is one
in a file, so that PEFT reads the same adapter from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import queries_key
from .probing import base_of, carriers, features, is_scaled, model_type

# By model type the projection's name, and a configuration's groups of outputs with the queries' at the start of each.
_Layout = Callable[[Any], tuple[int, int]]


def _heads_width(config: Any) -> int:
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def _blocks(config: Any) -> tuple[int, int]:  # [queries, keys, values]
    return 1, config.num_attention_heads * _heads_width(config)


def _by_head(config: Any) -> tuple[int, int]:  # [heads, (query, key, value)]
    return config.num_attention_heads, _heads_width(config)


def _falcon(config: Any) -> tuple[int, int]:
    heads, width = config.num_attention_heads, _heads_width(config)
    if config.new_decoder_architecture:  # [groups, (queries of a group, key, value)]
        return config.num_kv_heads, heads // config.num_kv_heads * width
    return (1, heads * width) if config.multi_query else (heads, width)


LAYOUTS: dict[str, tuple[str, _Layout]] = {
    "gpt2": ("c_attn", _blocks),
    "gpt_bigcode": ("c_attn", lambda config: _blocks(config) if config.multi_query else _by_head(config)),
    "phi3": ("qkv_proj", _blocks),
    "mpt": ("Wqkv", _blocks),
    "modernbert": ("Wqkv", _blocks),
    "gpt_neox": ("query_key_value", _by_head),
    "bloom": ("query_key_value", _by_head),
    "falcon": ("query_key_value", _falcon),
}


def queries(model: nn.Module, path: str, layer: nn.Module) -> Tensor | None:
    """Return which outputs of the projection are queries, ``[out]`` bool; None for what is no known projection."""
    name, layout = LAYOUTS.get(model_type(model) or "", ("", _blocks))
    sizes = features(base_of(layer))
    if path.rpartition(".")[2] != name or sizes is None:
        return None
    groups, count = layout(model.config)
    mask = torch.zeros(groups, sizes[1] // groups, dtype=torch.bool)
    if "crossattention" not in path:  # whose queries have a projection of their own
        mask[:, :count] = True
    return mask.view(-1)


def mark(model: nn.Module, adapter_name: str, config: Any) -> None:
    """Note on the layers of an adapter which of its entries are queries', and act as ones."""
    for path, layer in carriers(model):
        if not is_scaled(layer) or adapter_name not in layer.ia3_l:
            continue
        layer._buffers.pop(queries_key(adapter_name), None)
        mask = None if getattr(config, "scale_queries", True) or layer.is_feedforward else queries(model, path, layer)
        if mask is not None:
            vector = layer.ia3_l[adapter_name]
            device = "cpu" if vector.is_meta else vector.device
            layer.register_buffer(queries_key(adapter_name), mask.to(device).view(-1, 1), persistent=False)
            settle(layer)
        if "_running" in layer.__dict__:
            layer.note_running()


def _masks(model: nn.Module) -> Iterator[tuple[str, Any, str, Tensor]]:
    """Yield the layers of ``model`` and their adapters that leave queries alone: path, layer, adapter, its mask."""
    for path, layer in carriers(model):
        for name, mask in layer._buffers.items():
            if name.startswith(queries_key("")) and mask is not None:
                yield path, layer, name.removeprefix(queries_key("")), mask


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Write ones into the vectors of ``model`` where queries are left alone, and act as ones whatever is there."""
    for _, layer, adapter_name, mask in _masks(model):
        vector = layer.get_parameter(f"ia3_l.{adapter_name}")
        if not vector.is_meta and not hasattr(vector, "full_tensor"):
            vector.masked_fill_(mask.to(vector.device), 1.0)


def settled(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state with ones in the queries' places, where weight decay may have left others."""
    result = dict(state)
    masks = {f"{path}.ia3_l.{adapter_name}": mask for path, _, adapter_name, mask in _masks(model)}
    for key, tensor in state.items():
        mask = next((mask for end, mask in masks.items() if key == end or key.endswith(f".{end}")), None)
        if mask is not None:
            result[key] = tensor.masked_fill(mask.to(tensor.device), 1.0)
    return result
