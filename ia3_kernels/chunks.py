"""Rows of several adapters, cut into pieces for a deterministic sum: torch operators on the device of the index."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """Rows sorted by adapter and cut into chunks of one adapter each, as tensors on the device; nothing is read back.

    order: ``[rows]`` int64. first, last, adapter: ``[chunks]`` int32, a chunk being ``order[first:last]``, with adapter
    -1 for none and -2 for an unknown one. adapter_first, adapter_last: ``[adapters]`` int32, the chunks of each.
    """

    order: Tensor
    first: Tensor
    last: Tensor
    adapter: Tensor
    adapter_first: Tensor
    adapter_last: Tensor


def chunks_by_adapter(index: Tensor, adapters: int, chunk: int) -> Chunks:
    """Cut the rows with ``index`` (flat, int32) into chunks; rows of no known adapter come last."""
    rows = index.numel()
    known = (index >= 0) & (index < adapters)
    # -1 (ones) and an index without a row (NaN) are two further groups, after the adapters.
    group = torch.where(known, index, torch.where(index == -1, adapters, adapters + 1)).long()
    order = torch.argsort(group, stable=True)
    groups = torch.arange(adapters + 2, device=index.device)
    ends = torch.searchsorted(group[order], groups, right=True)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    counts = (ends - begins + chunk - 1) // chunk
    chunk_ends = counts.cumsum(0)
    chunk_begins = chunk_ends - counts
    # As many chunks as there can be: the host does not know the counts. Those left over begin behind the last row.
    chunks = torch.arange(rows // chunk + min(rows, adapters + 2), device=index.device)
    owner = torch.searchsorted(chunk_ends, chunks, right=True).clamp_max(adapters + 1)
    first = begins[owner] + (chunks - chunk_begins[owner]) * chunk
    last = torch.minimum(first + chunk, ends[owner])
    # The last group gets an index that load_scale turns into NaN, the one before it -1.
    adapter = torch.where(owner < adapters, owner, torch.where(owner == adapters, -1, -2))
    as_int32 = (tensor.to(torch.int32) for tensor in (first, last, adapter, chunk_begins, chunk_ends))
    return Chunks(order, *as_int32)
