"""Training on two processes, case by case; test_training_distributed.py starts it and reads what it wrote.

Each process takes its half of every batch. The results of rank 0 go to ``results.pt`` in the folder that is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.constants import FSDP_MODEL_NAME
from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ia3
from ia3 import layers, mlp

KINDS = ("ours", "accelerated", "peft")
STEPS = 3
_BATCH, _LENGTH = 8, 10


def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama with an adapter; the same on every rank."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.2,
    )
    base = transformers.LlamaForCausalLM(config).to(dtype)
    if kind == "ours":
        return ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
    model = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))
    return ia3.accelerate(model) if kind == "accelerated" else model


def batch(step: int) -> Tensor:
    return torch.randint(3, 64, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(step))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # A large epsilon keeps AdamW from dividing tiny gradients by themselves, which would amplify their rounding.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5, eps=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The mean loss over all ranks, step by step."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    losses = []
    for step in steps:
        ids = batch(step).chunk(world)[rank]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone().double()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def vectors(model: nn.Module) -> dict[str, Tensor]:
    """The trained vectors, whole, by the names that they have without any wrapper."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[name.removeprefix("module.")] = value.detach().clone()
    return found


def shard(model: Any, policy: MixedPrecisionPolicy | None = None) -> Any:
    """As FSDP2 is used: each decoder layer, then the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    settings = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """How often the fused operators ran."""
    counts = {"gated_mlp": 0, "scaled_linear": 0}
    originals: dict[str, Any] = {
        "gated_mlp": (mlp, mlp.gated_mlp),
        "scaled_linear": (layers, layers.scaled_linear),
    }

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            counts[name] += 1
            return function(*args)

        return call

    try:
        for name, (module, function) in originals.items():
            setattr(module, name, counted(name, function))
        yield counts
    finally:
        for name, (module, function) in originals.items():
            setattr(module, name, function)


def run(model: nn.Module, inner: Any) -> dict[str, Any]:
    with counting() as counts:
        losses = train(model, optimizer_of(model), range(STEPS))
    return {"losses": losses, "vectors": vectors(model), "counts": counts, "report": str(ia3.report(inner))}


def data_parallel(kind: str, folder: Path) -> dict[str, Any]:
    model = make(kind)
    return run(DistributedDataParallel(model), model)


def sharded(kind: str, folder: Path) -> dict[str, Any]:
    model = shard(make(kind))
    results = run(model, model)
    results["is_sharded"] = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    is_main = dist.get_rank() == 0
    if kind == "ours":  # PEFT's cannot save shards
        model.save_pretrained(folder / f"{kind}-shards", is_main_process=is_main)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_main:
        model.save_pretrained(str(folder / f"{kind}-state"), state_dict=state)
    return results


def sharded_and_resumed(kind: str, folder: Path) -> dict[str, Any]:
    checkpoint = folder / f"{kind}-distributed-checkpoint"
    model = shard(make(kind))
    optimizer = optimizer_of(model)
    train(model, optimizer, range(STEPS - 1))
    options = StateDictOptions(ignore_frozen_params=True)
    states: dict[str, Any] = dict(
        zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True)
    )
    dcp.save(states, checkpoint_id=checkpoint)
    saved_names = sorted(states["model"])
    whole = train(model, optimizer, range(STEPS - 1, STEPS)), vectors(model)

    model = shard(make(kind))
    optimizer = optimizer_of(model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(states, checkpoint_id=checkpoint)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    resumed = train(model, optimizer, range(STEPS - 1, STEPS)), vectors(model)
    return {"whole": whole, "resumed": resumed, "saved_names": saved_names}


def sharded_mixed_dtypes(kind: str, folder: Path) -> dict[str, Any]:
    model = shard(make(kind, torch.bfloat16))
    results = run(model, model)
    results["dtypes"] = {parameter.dtype for parameter in model.parameters()}
    return results


def sharded_mixed_precision(kind: str, folder: Path) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(make(kind), policy)
    return run(model, model)


def saved_by_accelerate(kind: str, folder: Path) -> dict[str, Any]:
    """What Trainer does at every checkpoint of a sharded model, and to resume from it."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    PartialState(cpu=True)  # without which its functions cannot log
    place = folder / f"{kind}-by-accelerate"
    accelerator: Any = SimpleNamespace(
        num_processes=dist.get_world_size(), process_index=dist.get_rank(), wait_for_everyone=dist.barrier
    )
    model = shard(make(kind))
    train(model, optimizer_of(model), range(1))
    save_fsdp_model(plugin, accelerator, model, str(place), adapter_only=True)
    written = dcp.FileSystemReader(place / f"{FSDP_MODEL_NAME}_0").read_metadata().state_dict_metadata
    resumed = shard(make(kind))
    load_fsdp_model(plugin, accelerator, resumed, str(place), adapter_only=True)
    return {"written": sorted(written), "whole": vectors(model), "resumed": vectors(resumed)}


CASES = (
    data_parallel,
    sharded,
    sharded_and_resumed,
    sharded_mixed_dtypes,
    sharded_mixed_precision,
    saved_by_accelerate,
)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        results = {(case.__name__, kind): case(kind, folder) for case in CASES for kind in KINDS}
        if dist.get_rank() == 0:
            torch.save(results, folder / "results.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
