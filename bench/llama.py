"""The Llama that the model suites run, once for each implementation: same weights, separate modules."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .settings import DTYPES, Settings

# Baselines by implementation; a compiled one is also compared with the plain frozen model, the reference of all.
BASELINES: Mapping[str, Sequence[str]] = {
    "ours": ("frozen_base", "peft", "liger_peft"),
    "accelerated": ("ours", "frozen_base", "peft"),
    "peft": ("frozen_base",),
    "ours+compile": ("frozen_base", "frozen_base+compile", "peft+compile", "peft+max-autotune"),
    "peft+compile": ("frozen_base", "frozen_base+compile"),
    "frozen_base+compile": ("frozen_base",),
}


def config(settings: Settings) -> LlamaConfig:
    """The configuration measured, or a very small one to try the harness with.

    On a GPU four layers of Llama-3.2-3B; on a CPU four layers a third as wide.
    """
    if settings.on_gpu and not settings.quick:
        return LlamaConfig(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=4,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128256,
            tie_word_embeddings=True,
            use_cache=False,
        )
    quick = settings.quick
    scale = 16 if quick else 1
    return LlamaConfig(
        hidden_size=1024 // scale,
        intermediate_size=4096 // scale,
        num_hidden_layers=2 if quick else 4,
        num_attention_heads=16 // (4 if quick else 1),
        num_key_value_heads=4 // (4 if quick else 1),
        vocab_size=4096 // scale,
        tie_word_embeddings=False,
        use_cache=False,
    )


def smollm2() -> LlamaConfig:
    """SmolLM2-135M's shapes: many narrow layers, and a head that is a fifth of the weights."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        use_cache=False,
    )


def describe(model_config: LlamaConfig) -> str:
    """The sizes that tell one case from another, for its name."""
    return f"llama {model_config.hidden_size}x{model_config.num_hidden_layers}"


@functools.cache
def has(package: str) -> bool:
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"bench: {package} is not installed, so its rows are left out; installing it adds them.", file=sys.stderr)
    return found


# What an implementation needs beside this package.
_NEEDS = {"peft": ("peft",), "accelerated": ("peft",), "liger_peft": ("peft", "liger_kernel")}


def _with_vectors(kind: str, base: Any) -> nn.Module:
    import ia3

    if kind == "ours":
        ours: nn.Module = ia3.get_peft_model(base, ia3.IA3Config(task_type=ia3.TaskType.CAUSAL_LM))
        return ours
    import peft

    if kind == "liger_peft":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=base)
    theirs: nn.Module = peft.get_peft_model(base, peft.IA3Config(task_type=peft.TaskType.CAUSAL_LM))
    return ia3.accelerate(theirs) if kind == "accelerated" else theirs


def models(
    settings: Settings, dtype: str, implementations: Sequence[str], model_config: LlamaConfig | None = None
) -> dict[str, nn.Module]:
    """One model for each of `implementations` that can run here, all with the same weights, on the run's device.

    The IA3 vectors are fp32 and the only parameters to train; in `frozen_base` there is none.
    """
    torch.manual_seed(0)
    base: nn.Module = LlamaForCausalLM(model_config or config(settings))
    base.to(settings.device, DTYPES[dtype]).requires_grad_(False)
    # Compiled code is cached by source function, which all of these models share: an earlier case's entries would
    # count towards the limit at which the compiler gives up.
    torch._dynamo.reset()
    built: dict[str, nn.Module] = {}
    for impl in implementations:
        kind, _, compiled = impl.partition("+")
        if not all(has(package) for package in _NEEDS.get(kind, ())):
            continue
        model = copy.deepcopy(base)
        if kind != "frozen_base":
            model = _with_vectors(kind, model)
        if compiled:
            model.compile(mode=None if compiled == "compile" else compiled)
        built[impl] = model
    return built


def check_agreement(values: Mapping[str, Tensor], dtype: str) -> None:
    """Raises RuntimeError unless all implementations computed the same, within twice the rounding of `dtype`.

    The vectors are ones, so every implementation is the base model: a faster step that computes something else must
    not be reported. Errors of single roundings add up like a random walk over the roundings of a forward, of which
    there are some 10 for each of the few layers.
    """
    reference = {impl: value.detach().double() for impl, value in values.items()}
    first, expected = next(iter(reference.items()))
    tolerance = 2 * torch.finfo(DTYPES[dtype]).eps * 40**0.5
    for impl, value in reference.items():
        error = float((value - expected).norm() / expected.norm())
        if not error <= tolerance:
            raise RuntimeError(
                f"{impl} and {first} differ by {error:.2g} (relative, {dtype}; expected at most {tolerance:.2g}), "
                "so their times cannot be compared; run the tests first"
            )
