"""Which slot each token of a batch reads: ``adapter_index`` in memory that stays where it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_SLOT = -1


class SlotIndex:
    """One int32 entry for every token that a batch may have, -1 where no adapter acts.

    It stands where vLLM has its LoRA kernels' metadata. Its memory is read by graphs that were captured or compiled
    before a batch is known, and written before they run: one copy a batch, which nobody waits for.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.buffer = torch.full((tokens,), NO_SLOT, dtype=torch.int32, device=device)
        self._slots_of: tuple[Any, Any, Any] = (None, None, None)

    def rows(self, x: Tensor) -> Tensor:
        """Return the entries of the tokens of ``x``, ``[*, n]``: a view ``[*]``."""
        return self.buffer[: math.prod(x.shape[:-1])].view(x.shape[:-1])

    def update_metadata(self, mapping: Any, lora_index_to_id: Sequence[int | None], *_: Any, **__: Any) -> None:
        """Write the slots of a batch.

        mapping: vLLM's, whose ``index_mapping`` has an adapter's id for every token, 0 for none.
        lora_index_to_id: the adapter in each slot, or None.
        """
        if self._slots_of[0] != lora_index_to_id:
            active = sorted((name, slot) for slot, name in enumerate(lora_index_to_id) if name is not None)
            table = np.array([(0, NO_SLOT), *active], dtype=np.int64)
            self._slots_of = list(lora_index_to_id), table[:, 0].copy(), table[:, 1].astype(np.int32)
        _, ids, slots = self._slots_of
        tokens = np.fromiter(mapping.index_mapping, np.int64, len(mapping.index_mapping))
        places = np.searchsorted(ids, tokens)
        if not np.array_equal(ids.take(places, mode="clip"), tokens):
            raise RuntimeError("a batch has tokens of an adapter that is in no slot; this is a fault of the engine's.")
        entries = torch.from_numpy(slots[places])
        if self.buffer.device.type != "cpu":
            entries = entries.pin_memory()  # of its own: the copy of the batch before may still be under way
        self.buffer[: len(entries)].copy_(entries, non_blocking=True)

    def join(self, wrapper: Any) -> None:
        """Write these entries whenever vLLM writes its LoRA kernels' metadata, which stays in ``wrapper``."""
        update = wrapper.update_metadata

        def update_both(mapping: Any, lora_index_to_id: Sequence[int | None], *rest: Any, **named: Any) -> None:
            update(mapping, lora_index_to_id, *rest, **named)
            self.update_metadata(mapping, lora_index_to_id)

        wrapper.update_metadata, wrapper.slot_index = update_both, self
