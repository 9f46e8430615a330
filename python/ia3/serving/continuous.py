"""Mixed adapters in transformers' continuous batching, where sequences join and leave a batch at every step.

Its batches are one row ``[1, tokens]`` of sequences of any length, and its manager runs them in a thread of its own. It
carries arguments for each request to its logits processors, and hands those to the model as well, beside the lengths of
the sequences: from the two follows the adapter of every token, on the device, so that captured graphs hold.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from ..errors import IA3Error
from .mixed import checked_names, open_source
from .routing import BASE, TokenRouting

_KEY = "adapter_row"  # among the arguments of a request


def generate_batch(
    tuner: Any,
    inputs: Sequence[Sequence[int]],
    adapter_names: Sequence[str],
    generation_config: Any = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Return the base model's ``generate_batch`` with an adapter for each of ``inputs``; its results, in their order.

    Blocks of the cache are never shared between requests of a common prefix: its keys and values are those of an
    adapter. Raises :class:`IA3Error`, before anything runs; what fails later is in the results' ``error``.
    """
    names = checked_names(adapter_names)
    if len(names) != len(inputs):
        raise IA3Error(f"adapter_names has {len(names)} names, and there are {len(inputs)} inputs; pass one for each.")
    model = tuner.model
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise IA3Error(
            "the model keeps a manager of continuous batching, which was made without adapter_names; "
            "destroy_cached_continuous_batching_manager first."
        )
    config = copy.deepcopy(continuous_batching_config) or ContinuousBatchingConfig()
    config.allow_block_sharing = False
    with tuner.gate.reading():
        source = open_source(tuner, names)
        tuner.gate.routes.add(source)
    try:
        rows = source.rows(names)
        manager = model.init_continuous_batching(generation_config, config)
        manager.logit_processor = _WithRows(manager.logit_processor)
        with torch.no_grad(), _routed(model, manager, source.scales):
            manager.warmup()
            manager.start()
            try:
                for number, (tokens, row) in enumerate(zip(inputs, rows, strict=True)):
                    arguments = {"max_new_tokens": max_new_tokens, _KEY: row}
                    manager.add_request(list(tokens), request_id=f"req_{number}", **arguments)
                return _collect(manager, len(inputs))
            finally:
                manager.stop(block=True, hard_stop=True)
                manager.destroy()
    finally:
        tuner.gate.routes.discard(source)
        source.close()


def _collect(manager: Any, count: int) -> dict[str, Any]:
    """Return the finished requests, those of one input together and in the order of the inputs."""
    total, finished = count * manager.num_return_sequences, dict[str, Any]()
    while len(finished) < total:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            finished[result.request_id] = result
        elif result is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching stopped before all requests were done.")
    children = [f"__child#{number}" for number in range(manager.num_return_sequences - 1)]
    return {name: finished[name] for n in range(count) for name in (*(f"req_{n}{c}" for c in children), f"req_{n}")}


class _WithRows(ContinuousBatchingLogitsProcessorList):
    """The manager's logits processors, and one row more of arguments: for each sequence of a batch its adapter."""

    def __init__(self, processors: ContinuousBatchingLogitsProcessorList) -> None:
        self.__dict__.update(processors.__dict__)
        self.tensors_required = processors.tensors_required + 1

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        super().check_kwargs({name: value for name, value in kwargs.items() if name != _KEY})

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        super().fill_defaults(int32_tensor)
        int32_tensor[-1].fill_(BASE)

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        super().prepare_tensor_args(requests_in_batch, arg_storage)
        rows = [request.state.logit_processor_kwargs.get(_KEY, BASE) for request in requests_in_batch]
        arg_storage[-1, : len(rows)] = torch.tensor(rows, dtype=torch.int32, device=arg_storage.device)
        return arg_storage


@contextmanager
def _routed(model: nn.Module, manager: Any, scales: Mapping[nn.Module, Tensor | None]) -> Iterator[None]:
    """While the manager runs the model, in whichever thread, its tokens are routed; other calls are left alone."""
    running: list[TokenRouting] = []

    def enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if manager.batch_processor is not None and kwargs.get("cache") is manager.batch_processor.cache:
            index = _token_rows(kwargs["logits_processor_args"][-1], kwargs["cu_seq_lens_q"], kwargs["input_ids"])
            running.append(TokenRouting(scales, index))
            running[-1].__enter__()

    def leave(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if running and kwargs.get("cache") is manager.batch_processor.cache:
            running.pop().__exit__()

    handles = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _token_rows(rows: Tensor, ends: Tensor, input_ids: Tensor) -> Tensor:
    """Return each token's adapter, ``[1, tokens]``, from each sequence's and where it ends, ``[0, n_1, n_1 + n_2, …]``.

    What pads a batch of fixed size comes after the last sequence, and takes the last one's.
    """
    positions = torch.arange(input_ids.shape[-1], dtype=ends.dtype, device=ends.device)
    sequence = torch.searchsorted(ends[1:].contiguous(), positions, right=True).clamp_(max=rows.shape[0] - 1)
    return rows[sequence].reshape(input_ids.shape)
