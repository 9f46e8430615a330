"""Which adapter each row of a batch takes: an index that every layer of a model reads while a batch runs.

The index belongs to the context that runs the batch, a thread's or a coroutine's, so that batches of different mixes
may run at once on one model. It is one int32 tensor, and :meth:`RowRouting.assign` writes into it: what has captured it
(a CUDA graph) stays valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import IA3Error
from ..layers import Routing, current, route

BASE = -1  # the row of the base model, as in the operators' adapter_index
# Shapes of activations that one batch has at a time: prompt and token, or those of an encoder and a decoder.
_KEPT_SHAPES = 8


class RowRouting:
    """The adapters of one batch: a matrix of vectors for each layer, and the row of it that each sequence takes.

    scales: for every scaled layer of the model ``[adapters, n]``, or None where no adapter has a vector.
    rows: for each sequence its row of those matrices, or ``BASE``.
    repeats: how many copies of a sequence may stand next to each other in the batch (beams, returned sequences).
    """

    def __init__(
        self, scales: Mapping[nn.Module, Tensor | None], rows: Sequence[int], device: torch.device, repeats: int = 1
    ) -> None:
        self.scales = scales
        self.repeats = repeats
        self.outer: Routing | None = None
        self.index = torch.tensor(rows, dtype=torch.int32, device=device)  # [sequences]
        self._note(rows)

    def assign(self, rows: Sequence[int]) -> None:
        """Route the next batch of as many sequences, in place."""
        self.index.copy_(torch.tensor(rows, dtype=torch.int32))
        self._note(rows)

    def _note(self, rows: Sequence[int]) -> None:
        distinct = set(rows)
        # The row that all sequences take, where they do.
        self.shared = rows[0] if len(distinct) == 1 else None
        self._shared_scales: dict[nn.Module, Tensor] = {}
        self._expanded: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def scale_of(self, layer: nn.Module, x: Tensor, batch_shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
        """Return the scale of ``layer`` and its ``adapter_index`` of shape ``batch_shape``; for a vector, no index.

        Rows that all take one adapter get its vector, rows of the base model alone nothing. A graph that is being
        compiled or captured is to hold for every mix, and always gets the index.
        """
        scale = self.scales[layer]
        if scale is None:
            return None, None
        if torch.compiler.is_compiling() or (self.index.is_cuda and torch.cuda.is_current_stream_capturing()):
            return scale, self._expand(batch_shape, x.device)
        if self.shared is None:
            key = (batch_shape, x.device)
            index = self._expanded.get(key)
            if index is None:
                if len(self._expanded) >= _KEPT_SHAPES:
                    self._expanded.clear()
                index = self._expanded[key] = self._expand(batch_shape, x.device)
            return scale, index
        self._copies(batch_shape)
        if self.shared == BASE:
            return None, None
        vector = self._shared_scales.get(layer)
        if vector is None:
            vector = self._shared_scales[layer] = scale[self.shared]
        return vector, None

    def _expand(self, batch_shape: torch.Size, device: torch.device) -> Tensor:
        """Return the index for rows of this shape, contiguous: every position takes its sequence's adapter."""
        copies = self._copies(batch_shape)
        index = self.index.to(device)
        if copies != 1:
            index = index.repeat_interleave(copies)
        return index.view(-1, *(1,) * (len(batch_shape) - 1)).expand(batch_shape).contiguous()

    def _copies(self, batch_shape: torch.Size) -> int:
        """Return how many of the first dimension's entries belong to each sequence."""
        sequences, rows = self.index.shape[0], batch_shape[0] if len(batch_shape) else 0
        if rows == sequences:
            return 1
        if rows == sequences * self.repeats:
            return self.repeats
        if len(batch_shape) == 1 and rows and rows % sequences == 0:
            return rows // sequences  # [sequences · positions, n], flattened
        expected = f"{sequences}" if self.repeats == 1 else f"{sequences} or {sequences * self.repeats}"
        raise IA3Error(
            f"a layer got activations of batch shape {list(batch_shape)}, whose rows cannot be told apart by the "
            f"{sequences} adapter_names; expected {expected} as the first dimension: pass one name for each sequence."
        )

    def __enter__(self) -> RowRouting:
        self.outer = _open(current.routing)
        route(self)
        return self

    def __exit__(self, *exception: object) -> None:
        # It is over for whoever has inherited it, too, and it may not be the innermost: without scales it routes no
        # layer, and others pass it over.
        self.scales = {}
        route(_open(current.routing))


def _open(routing: Routing | None) -> Routing | None:
    """Return the innermost routing that was not left."""
    while routing is not None and not routing.scales:
        routing = routing.outer
    return routing


class TokenRouting(RowRouting):
    """The adapters of a batch ``[1, tokens]`` of sequences side by side.

    index: for each token its row, of the batch's shape, int32; on a device, where the host does not look at it.
    """

    def __init__(self, scales: Mapping[nn.Module, Tensor | None], index: Tensor) -> None:
        self.scales = scales
        self.outer: Routing | None = None
        self.index = index
        self._note([])

    def _expand(self, batch_shape: torch.Size, device: torch.device) -> Tensor:
        if batch_shape.numel() != self.index.numel():
            raise IA3Error(
                f"a layer got activations of batch shape {list(batch_shape)}, and the batch has {self.index.numel()} "
                "tokens; adapt layers that see all of them."
            )
        return self.index.to(device).reshape(batch_shape)
