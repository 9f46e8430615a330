"""A cut of Qwen3-MoE: a training step, a decoded token and an adapter's size, against the frozen base and PEFT's LoRA.

IA3 with its default targets, keys, values and the experts' down projections, and with the latter alone; LoRA of rank 16
on both parameters of the experts, and on the down projections alone. PEFT's IA3 reaches no experts.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import ia3

from .. import llama, training
from ..measure import interleave
from ..records import Recorder
from ..settings import DTYPES, Settings
from .decode import WARMUP, step_function

_SUITE = "moe"
_RANK = 16
_LORA = {
    f"peft lora rank {_RANK}": ["experts.gate_up_proj", "experts.down_proj"],
    f"peft lora rank {_RANK}, down_proj": ["experts.down_proj"],
}
_OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, down_proj": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
}
_BASELINES = {**dict.fromkeys(_OURS, ("frozen_base", *_LORA)), **dict.fromkeys(_LORA, ("frozen_base",))}


def _config(settings: Settings) -> Qwen3MoeConfig:
    """Four layers of Qwen3-30B-A3B on a GPU; on a CPU half of everything, with as many tokens for each expert."""
    sizes = (2048, 768, 4, 32, 4, 128, 8, 151936) if settings.on_gpu else (1024, 384, 4, 8, 2, 64, 4, 4096)
    if settings.quick:
        sizes = (64, 32, 2, 4, 2, 8, 2, 256)
    hidden, inner, layers, heads, groups, experts, chosen, vocabulary = sizes
    return Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads if settings.quick else 128,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        vocab_size=vocabulary,
        use_cache=False,
    )


def _models(settings: Settings, dtype: str, model_config: Qwen3MoeConfig) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base: nn.Module = Qwen3MoeForCausalLM(model_config)
    base.to(settings.device, DTYPES[dtype]).requires_grad_(False)
    models = {"frozen_base": base}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "target_modules is not set")
        for name, targets in _OURS.items():
            config = ia3.IA3Config(task_type=ia3.TaskType.CAUSAL_LM, **targets)
            models[name] = ia3.get_peft_model(copy.deepcopy(base), config)
    if llama.has("peft"):
        import peft

        for name, parameters in _LORA.items():
            lora = peft.LoraConfig(
                r=_RANK, target_modules=[], target_parameters=parameters, task_type=peft.TaskType.CAUSAL_LM
            )
            models[name] = peft.get_peft_model(copy.deepcopy(base), lora)
    return models


def run(settings: Settings, recorder: Recorder) -> None:
    """Measures every implementation in each dtype."""
    config = _config(settings)
    what = f"qwen3-moe {config.hidden_size}x{config.num_hidden_layers}, {config.num_experts} experts"
    for dtype in settings.dtypes:
        models = _models(settings, dtype, config)
        inputs = training.batch(settings, dtype, config.hidden_size, config.vocab_size)
        batch, tokens = inputs.labels.shape
        steps = {impl: training.step_function(impl, model.train(), inputs) for impl, model in models.items()}
        llama.check_agreement({impl: step() for impl, step in steps.items()}, dtype)
        times = interleave(steps, settings.rounds(7), warmup=2, device=settings.device)
        recorder.add_times(_SUITE, f"{what}, step, batch {batch}x{tokens}", dtype, times, _BASELINES)
        context, rounds = 8 if settings.quick else 128, settings.rounds(20)
        prompt = torch.randint(config.vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
        decoding = {
            impl: step_function(model.eval(), config, prompt.to(settings.device), 1 + WARMUP + rounds)
            for impl, model in models.items()
        }
        llama.check_agreement({impl: step() for impl, step in decoding.items()}, dtype)
        times = interleave(decoding, rounds, WARMUP, device=settings.device)
        recorder.add_times(_SUITE, f"{what}, decode, batch 1, context {context}", dtype, times, _BASELINES)
        sizes = {
            impl: sum(one.numel() for one in model.parameters() if one.requires_grad) * 4
            for impl, model in models.items()
            if impl != "frozen_base"
        }
        for impl, size in sizes.items():
            ratios = {name: size / sizes[name] for name in _LORA if impl in _OURS and name in sizes}
            recorder.add(_SUITE, f"{what}, adapter, fp32", dtype, impl, ratios=ratios, nbytes=size)
