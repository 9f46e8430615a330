"""A whole model, as somebody with a GPU would ask about it: its training step, its decoding.

Llama-3.2-3B with random weights on a GPU, where it takes 7 GB beside what a step needs; a small Llama on a CPU. One
process and one set of frozen weights, which all implementations share, so that only what they add differs. The step is
that of PEFT's own benchmark, AdamW included.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama import modeling_llama

import ia3

from .. import llama
from ..measure import captured, interleave, kernels_of
from ..records import Recorder
from ..settings import DTYPES, Settings

_SUITE = "protocol"
_Step = Callable[[], Tensor]
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
_COMPILED = ("frozen_base+compile", "peft+compile", "ours+compile")
_CONTEXT = 128  # tokens before the one that is decoded
_ROWS = 64  # of the largest batch that decodes


def run(settings: Settings, recorder: Recorder) -> None:
    """Measures training steps and decoding of every implementation in each dtype."""
    for dtype in settings.dtypes:
        config = _config(settings)
        base = _base(settings, config, dtype)
        for batch, tokens in _shapes(settings):
            for layout in LAYOUTS:
                names = _step_names(settings, layout, is_first=(batch, tokens) == _shapes(settings)[0])
                case = f"{llama.describe(config)}, batch {batch}x{tokens}, {layout}"
                _train(settings, recorder, case, dtype, base, names, LAYOUTS[layout], (batch, tokens))
        _decode(settings, recorder, dtype, base, config)
        del base
        gc.collect()
        if compiled := [name for name in _COMPILED if name in settings.implementations]:
            # A whole model would take minutes to compile, and its layers are all the same.
            few = llama.config(settings)
            batch, tokens = (4, 768) if settings.on_gpu and not settings.quick else _shapes(settings)[0]
            torch._dynamo.reset()
            _train(
                *(settings, recorder, f"{llama.describe(few)}, batch {batch}x{tokens}, compiled", dtype),
                *(_base(settings, few, dtype), ["frozen_base", "peft", "ours", *compiled], {}, (batch, tokens)),
            )


def _shapes(settings: Settings) -> list[tuple[int, int]]:
    """Sequences and tokens of each, of the batches that are trained on."""
    if settings.quick:
        return [(2, 16)]
    return [(4, 512), (8, 768)] if settings.on_gpu else [(4, 256)]


def _config(settings: Settings) -> LlamaConfig:
    if not settings.on_gpu or settings.quick:
        return llama.config(settings)
    whole = llama.config(settings)
    whole.num_hidden_layers = 28
    return whole


def _base(settings: Settings, config: LlamaConfig, dtype: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(settings.device):
        return LlamaForCausalLM(config).to(DTYPES[dtype]).requires_grad_(False)


def _sharing(base: nn.Module) -> Any:
    """A copy with modules of its own, and the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


# --- training -----------------------------------------------------------------------------------------------------


def _step_names(settings: Settings, layout: str, is_first: bool) -> list[str]:
    """What is compared in a layout: everything in the first shape, and of what depends on the shape the rest."""
    names = ["frozen_base", "peft", "ours"]
    if layout == "default":
        names += ["LoRA rank 32", *(["peft, Liger", "ours, Liger"] if settings.on_gpu else [])]
        if is_first:
            names += ["v_proj bias", *(["accelerated"] if "accelerated" in settings.implementations else [])]
    elif layout == "block inputs" and not is_first:
        return []
    return names


def _is_installed(name: str) -> bool:
    kind = name.partition("+")[0].partition(",")[0]
    packages = {"peft": ["peft"], "accelerated": ["peft"], "LoRA rank 32": ["peft"]}.get(kind, [])
    return all(llama.has(package) for package in [*packages, *(["liger_kernel"] if "Liger" in name else [])])


def _build(name: str, base: Any, targets: Mapping[str, Any]) -> Any:
    kind = name.partition("+")[0]
    if "Liger" in kind:
        kind = kind.partition(",")[0]
        with _untouched(modeling_llama):
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            # Its norms and its loss. Its rotary embedding would be everybody's, and its block is not ours.
            apply_liger_kernel_to_llama(model=base, rope=False, swiglu=kind == "peft")
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


@contextlib.contextmanager
def _untouched(module: Any) -> Iterator[None]:
    """Puts back what another library sets in a module, where the other implementations would find it."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _step_function(model: nn.Module, embeds: Tensor, labels: Tensor) -> _Step:
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


def _train(
    settings: Settings,
    recorder: Recorder,
    case: str,
    dtype: str,
    base: LlamaForCausalLM,
    names: Sequence[str],
    targets: Mapping[str, Any],
    shape: tuple[int, int],
) -> None:
    """Time of a step; on a GPU also the time and number of its kernels, and its peak memory."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(*shape, base.config.hidden_size, generator=generator).to(settings.device, DTYPES[dtype])
    labels = torch.randint(base.config.vocab_size, shape, generator=generator).to(settings.device)
    steps: dict[str, _Step] = {}
    for name in filter(_is_installed, names):
        model = _build(name, _sharing(base), targets).train()
        if name.endswith("+compile"):
            model.compile()
        steps[name] = _step_function(model, embeds, labels)
    if not steps:
        return
    losses = {name: float(step()) for name, step in steps.items()}
    # All start as the base model, at a loss that is the logarithm of the vocabulary's size or so.
    for name, loss in losses.items():
        if not math.isclose(loss, losses["frozen_base"], rel_tol=0.01):
            raise RuntimeError(f"{name} starts at a loss of {loss:.3f}, the frozen base at {losses['frozen_base']:.3f}")
    times = interleave(steps, settings.rounds(12 if shape[0] <= 4 else 6), warmup=2, device=settings.device)
    baselines = {name: [other for other in _BASELINES if other != name] for name in steps}
    recorder.add_times(_SUITE, case, dtype, times, baselines)
    if settings.on_gpu:
        peaks = {name: _peak_bytes(step) for name, step in steps.items()}
        profiles = {name: kernels_of(step) for name, step in steps.items()}
        for name, (seconds, launches) in profiles.items():
            ratios = {"frozen_base": seconds / profiles["frozen_base"][0], "launches": float(launches)}
            recorder.add(_SUITE, f"{case}, kernels", dtype, name, times=[seconds], ratios=ratios)
            ratios = {"frozen_base": peaks[name] / peaks["frozen_base"]}
            recorder.add(
                _SUITE, f"{case}, peak memory beside the weights", dtype, name, ratios=ratios, nbytes=peaks[name]
            )
    recorder.save()


def _peak_bytes(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- decoding -----------------------------------------------------------------------------------------------------


def _decode(settings: Settings, recorder: Recorder, dtype: str, base: LlamaForCausalLM, config: LlamaConfig) -> None:
    """One token of 1, 16 and 64 rows, of which the last also with an adapter each; on a GPU out of a CUDA graph."""
    ours = _build("ours", _sharing(base), {}).eval()
    models = {"base": _sharing(base).eval(), "ours": ours}
    if llama.has("peft"):
        models["peft"] = _build("peft", _sharing(base), {}).eval()
    context = 8 if settings.quick else _CONTEXT
    rounds, warmup = settings.rounds(30), 3
    names = [f"{row}" for row in range(_ROWS)]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad(), ia3.AdapterBank(ours, _ROWS) as bank:
        vectors = ia3.get_peft_model_state_dict(ours)
        for name in names:
            bank.load(
                name, {key: 1 + 0.2 * torch.randn(value.shape, generator=generator) for key, value in vectors.items()}
            )
        for rows in (1, 16, _ROWS):
            prompt = torch.randint(config.vocab_size, (rows, context), generator=generator).to(settings.device)
            # A static cache costs the same at every position: attention runs over all of its slots, under a mask.
            slots = context + rounds + warmup + 4
            steps = {
                name: _decode_step(model, StaticCache(config, max_cache_len=slots), prompt)
                for name, model in models.items()
            }
            if rows == _ROWS:
                cache = StaticCache(config, max_cache_len=slots)
                steps[f"ours, {rows} adapters"] = _decode_step(ours, cache, prompt, names)
            times = interleave(steps, rounds, warmup, device=settings.device)
            case = f"{llama.describe(config)}, decode, {rows} rows, context {context}"
            recorder.add_times(_SUITE, case, dtype, times, {name: ("base",) for name in steps if name != "base"})
            recorder.save()


def _decode_step(model: Any, cache: StaticCache, prompt: Tensor, adapters: Sequence[str] = ()) -> Callable[[], object]:
    """A function that decodes one token more of each row, after ``prompt`` [rows, tokens] has filled the cache."""
    # Always the same token, not the likeliest: near a tie, rounding would make the implementations part ways.
    token = prompt[:, :1].contiguous()

    def forward(tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    def step() -> Tensor:
        return forward(token)

    with model.route(list(adapters)) if adapters else contextlib.nullcontext() as route:
        forward(prompt)
        if prompt.is_cuda:
            # The graph reads the route's index, which lives as long as the route.
            return captured(lambda kept=route: step(), 1)
    if not adapters:
        return step

    def mixed() -> Tensor:
        with model.route(list(adapters)):
            return step()

    return mixed
