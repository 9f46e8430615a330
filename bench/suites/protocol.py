"""A whole model's training step, with its optimizer, as PEFT's own benchmark runs it: one process, one set of weights.

Llama-3.2-3B with random weights on a GPU, where it takes 7 GB beside what a step needs; a small Llama on a CPU. The
frozen parameters are shared by all implementations, so that only what they add differs.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ia3

from .. import llama
from ..measure import interleave, synchronize
from ..records import Recorder
from ..settings import DTYPES, Settings

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_BLOCK = ["gate_proj", "up_proj", "down_proj"]
# What is scaled: PEFT's defaults for a Llama; outputs of every linear layer, but for the input of the last; outputs in
# the attention and inputs in the block, from which PEFT's benchmark gets the most on GSM8K.
LAYOUTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "default": {},
    "all-linear": {"target_modules": [*_ATTENTION, *_BLOCK], "feedforward_modules": ["down_proj"]},
    "block inputs": {"target_modules": [*_ATTENTION, *_BLOCK], "feedforward_modules": _BLOCK},
}
_BASELINES = ("frozen_base", "peft", "frozen_base+compile", "peft+compile", "peft, Liger")


def run(settings: Settings, recorder: Recorder) -> None:
    """Measures steps of every implementation: time, and on a GPU the time and number of kernels, and peak memory."""
    config = _config(settings)
    shapes = [(4, 512), (8, 768)] if settings.on_gpu else [(4, 256)]
    for dtype in settings.dtypes:
        for batch, tokens in [(2, 16)] if settings.quick else shapes:
            # Compiled code of another shape would count towards the limit at which the compiler gives up.
            torch._dynamo.reset()
            steps = _steps(settings, config, dtype, batch, tokens)
            case = f"{llama.describe(config)}, batch {batch}x{tokens}"
            for layout, chosen in steps.items():
                _measure(settings, recorder, f"{case}, {layout}", dtype, chosen)
            del steps
            gc.collect()


def _config(settings: Settings) -> LlamaConfig:
    if not settings.on_gpu or settings.quick:
        return llama.config(settings)
    whole = llama.config(settings)
    whole.num_hidden_layers = 28
    return whole


def _steps(
    settings: Settings, config: LlamaConfig, dtype: str, batch: int, tokens: int
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """A step function of each implementation, by the layout that it is compared in."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        base = LlamaForCausalLM(config).to(DTYPES[dtype]).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(batch, tokens, config.hidden_size, generator=generator).to(settings.device, DTYPES[dtype])
    labels = torch.randint(config.vocab_size, (batch, tokens), generator=generator).to(settings.device)
    found: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for layout, targets in LAYOUTS.items():
        names = ["frozen_base", "peft", "ours", "accelerated"]
        if layout == "default":
            names += ["v_proj bias", "LoRA rank 32", "frozen_base+compile", "peft+compile", "ours+compile"]
            names += ["peft, Liger", "ours, Liger"] if settings.on_gpu else []
        found[layout] = {}
        for name in names:
            kind, _, compiled = name.partition("+")
            is_left_out = name not in settings.implementations and (compiled or kind == "accelerated")
            if is_left_out or not _is_installed(kind):
                continue
            model = _build(kind, _sharing(base), targets).train()
            if compiled:
                model.compile()
            found[layout][name] = _step_function(model, embeds, labels)
    return found


def _is_installed(kind: str) -> bool:
    needs = {"peft": ("peft",), "accelerated": ("peft",), "LoRA rank 32": ("peft",)}
    packages = (*needs.get(kind.partition(",")[0], ()), *(("liger_kernel",) if "Liger" in kind else ()))
    return all(llama.has(package) for package in packages)


def _sharing(base: nn.Module) -> Any:
    """A copy with modules of its own, and the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def _build(kind: str, base: Any, targets: Mapping[str, Any]) -> Any:
    if "Liger" in kind:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=base)
        kind = kind.partition(",")[0]
    if kind == "frozen_base":
        return base
    if kind == "v_proj bias":
        for module in base.modules():
            if hasattr(module, "v_proj"):
                module.v_proj.bias = nn.Parameter(module.v_proj.weight.new_zeros(module.v_proj.out_features))
        return base
    if kind == "ours":
        return ia3.get_peft_model(base, ia3.IA3Config(task_type=ia3.TaskType.CAUSAL_LM, **targets))
    import peft

    if kind.startswith("LoRA"):
        return peft.get_peft_model(
            base, peft.LoraConfig(task_type="CAUSAL_LM", r=32, target_modules=["q_proj", "v_proj"])
        )
    theirs = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM", **targets))
    return ia3.accelerate(theirs) if kind == "accelerated" else theirs


def _step_function(model: nn.Module, embeds: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A function that runs forward, backward and AdamW, and returns the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    inputs = embeds.clone().requires_grad_(not trained)  # a frozen model's step computes gradients of its inputs

    def step() -> Tensor:
        inputs.grad = None
        loss: Tensor = model(inputs_embeds=inputs, labels=labels).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _measure(
    settings: Settings, recorder: Recorder, case: str, dtype: str, steps: Mapping[str, Callable[[], Tensor]]
) -> None:
    losses = {name: float(step()) for name, step in steps.items()}
    # All start as the base model, at a loss that is the logarithm of the vocabulary's size or so.
    for name, loss in losses.items():
        if not math.isclose(loss, losses["frozen_base"], rel_tol=0.01):
            raise RuntimeError(f"{name} starts at a loss of {loss:.3f}, the frozen base at {losses['frozen_base']:.3f}")
    times = interleave(steps, settings.rounds(12), warmup=2, device=settings.device)
    baselines = {name: [base for base in _BASELINES if base != name] for name in steps}
    recorder.add_times("protocol", case, dtype, times, baselines)
    if settings.on_gpu:
        peaks = {name: _peak_bytes(step) for name, step in steps.items()}
        profiles = {name: _kernels(step) for name, step in steps.items()}
        for name in steps:
            recorder.add(
                "protocol",
                f"{case}, peak memory above what lives anyway",
                dtype,
                name,
                ratios={"frozen_base": peaks[name] / peaks["frozen_base"]},
                nbytes=peaks[name],
            )
            seconds, launches = profiles[name]
            recorder.add(
                "protocol",
                f"{case}, its kernels ({launches} launches)",
                dtype,
                name,
                times=[seconds],
                ratios={"frozen_base": seconds / profiles["frozen_base"][0]},
            )


def _peak_bytes(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _kernels(step: Callable[[], object]) -> tuple[float, int]:
    """Seconds that a step's kernels take on the GPU, and how many there are."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        synchronize("cuda")
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time_total for event in kernels) * 1e-6, len(kernels)
