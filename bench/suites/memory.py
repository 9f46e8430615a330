"""Bytes kept for backward: of one Llama block in the middle of a model, and of a whole training step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from .. import llama, training
from ..measure import saved_bytes
from ..records import Recorder
from ..settings import Settings


def _find(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, kind))


def _state(model: nn.Module) -> list[Tensor]:
    return list(chain(model.parameters(), model.buffers()))


def _block_bytes(model: nn.Module, inputs: training.Batch) -> int:
    """Of the first block, with gradients wanted for its input, as everywhere but at the very start of a model."""
    hidden = inputs.inputs_embeds.detach().clone().requires_grad_(True)
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    cosine, sine = _find(model, LlamaRotaryEmbedding)(hidden, positions)
    block = _find(model, LlamaDecoderLayer)
    return saved_bytes(
        lambda: block(hidden, position_embeddings=(cosine, sine)), [*_state(model), hidden, cosine, sine]
    )


def _step_bytes(impl: str, model: nn.Module, inputs: training.Batch) -> int:
    embeds, _ = training.leaves(impl, model, inputs)
    return saved_bytes(
        lambda: model(inputs_embeds=embeds, labels=inputs.labels).loss, [*_state(model), embeds, inputs.labels]
    )


def _peak_bytes(impl: str, model: nn.Module, inputs: training.Batch) -> int:
    """What the allocator hands out at most during a step, less what it had handed out before."""
    step = training.step_function(impl, model, inputs)
    step()  # libraries allocate their workspaces at first use
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _add(recorder: Recorder, case: str, dtype: str, counted: Mapping[str, int]) -> None:
    for impl, nbytes in counted.items():
        ratios = {base: nbytes / counted[base] for base in llama.BASELINES.get(impl, ()) if base in counted}
        recorder.add("memory", case, dtype, impl, ratios=ratios, nbytes=nbytes)


def run(settings: Settings, recorder: Recorder) -> None:
    """Counts for the implementations that run eagerly; the bytes are the same in every run."""
    config = llama.config(settings)
    eager = [impl for impl in settings.implementations if "+" not in impl]
    for dtype in settings.dtypes:
        inputs = training.batch(settings, dtype, config.hidden_size, config.vocab_size)
        models = llama.models(settings, dtype, eager)
        size = "batch {}x{}".format(*inputs.labels.shape)
        block = {impl: _block_bytes(model.train(), inputs) for impl, model in models.items()}
        _add(recorder, f"{llama.describe(config)}, one block, {size}", dtype, block)
        step = {impl: _step_bytes(impl, model, inputs) for impl, model in models.items()}
        _add(recorder, f"{llama.describe(config)}, step, {size}", dtype, step)
        if settings.on_gpu:
            peak = {impl: _peak_bytes(impl, model, inputs) for impl, model in models.items()}
            _add(recorder, f"{llama.describe(config)}, peak of a step above what lives anyway, {size}", dtype, peak)
