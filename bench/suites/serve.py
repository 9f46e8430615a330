"""vLLM with 64 requests in a batch: the base model, an IA3 adapter for each, a LoRA adapter for each.

The engines live in this process, and are asked in turns. The base is measured as vLLM starts it, and run
eagerly as well: on a CPU vLLM compiles no model that has LoRA. LoRA has the layers that IA3 scales. One saved
adapter stands for all 64, under as many names and in as many slots; what a token costs does not depend on the values.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from .. import llama
from ..measure import interleave
from ..records import Recorder
from ..settings import Settings

_SUITE = "serve"
_ROWS, _PROMPT, _TOKENS, _RANK = 64, 8, 24, 16
_LAYERS = ["k_proj", "v_proj", "down_proj"]
_IA3, _LORA = f"vllm, {_ROWS} IA3 adapters", f"vllm, {_ROWS} LoRA adapters of rank {_RANK}"
_BASE, _EAGER = "vllm base", "vllm base, eager"
_COLD, _WARM = "first token, cold IA3 adapter", "first token, IA3 adapter in a slot"


def run(settings: Settings, recorder: Recorder) -> None:
    """Measures tokens a second, and the time to the first token of an adapter that was never seen."""
    if not llama.has("vllm"):
        print("serve: vLLM is not installed here; `make test-vllm` makes an environment that has it.")
        return
    # One engine's share of the machine; its cache is larger than 64 requests need.
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    for dtype in settings.dtypes:
        with tempfile.TemporaryDirectory() as folder, _engines(settings, dtype, Path(folder)) as engines:
            _throughput(settings, recorder, dtype, engines, Path(folder))
            _first_token(settings, recorder, dtype, engines[_IA3], Path(folder))


@contextmanager
def _engines(settings: Settings, dtype: str, folder: Path) -> Iterator[dict[str, Any]]:
    from vllm import LLM

    config = llama.config(settings) if settings.quick or settings.on_gpu else llama.smollm2()
    config.head_dim = max(config.head_dim, 32)  # vLLM's least on a CPU
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    _save_adapters(model, folder)
    adapters = {"enable_lora": True, "max_loras": _ROWS, "max_cpu_loras": 2 * _ROWS}
    kinds: dict[str, dict[str, Any]] = {
        _BASE: {},
        _EAGER: {"enforce_eager": True},
        _IA3: adapters | {"max_lora_rank": 1, "additional_config": {"ia3": True}},
        _LORA: adapters | {"max_lora_rank": _RANK, "lora_target_modules": _LAYERS},
    }
    shared = {"gpu_memory_utilization": 0.2} if settings.on_gpu else {}
    engines: dict[str, Any] = {}
    try:
        for name, own in kinds.items():
            engines[name] = LLM(
                str(folder / "model"),
                dtype={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype],
                skip_tokenizer_init=True,
                max_model_len=256,
                max_num_seqs=_ROWS,
                enable_prefix_caching=False,
                block_size=32,
                num_gpu_blocks_override=3 * _ROWS,  # more than the requests need: four engines share the memory
                **shared,
                **own,
            )
        yield engines
    finally:
        for engine in engines.values():
            engine.llm_engine.engine_core.shutdown()


def _save_adapters(model: LlamaForCausalLM, folder: Path) -> None:
    import peft

    configs = {
        "ia3": peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=_RANK, target_modules=_LAYERS, init_lora_weights=False),
    }
    for name, config in configs.items():
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(folder / name)
        adapted.unload()


def _throughput(settings: Settings, recorder: Recorder, dtype: str, engines: dict[str, Any], folder: Path) -> None:
    requests = {_IA3: _requests("ia3", folder, _ROWS), _LORA: _requests("lora", folder, _ROWS)}
    steps = {name: _step(engine, requests.get(name), _ROWS, _TOKENS) for name, engine in engines.items()}
    times = interleave(steps, settings.rounds(5), 1)
    case = f"{_ROWS} requests of {_PROMPT} tokens and {_TOKENS} new ones"
    recorder.add_times(_SUITE, case, dtype, times, {_IA3: (_BASE, _EAGER, _LORA), _LORA: (_BASE, _EAGER)})


def _first_token(settings: Settings, recorder: Recorder, dtype: str, engine: Any, folder: Path) -> None:
    """The slots are full: a new adapter is read, and takes the place of another."""
    (warm,) = _requests("ia3", folder, 1)
    fresh = iter(_requests("ia3", folder, 1000)[_ROWS:])
    steps: dict[str, Callable[[], object]] = {
        _WARM: _step(engine, [warm], 1, 1),
        _COLD: lambda: _step(engine, [next(fresh)], 1, 1)(),
    }
    times = interleave(steps, settings.rounds(40), 4)
    recorder.add_times(_SUITE, f"1 request of {_PROMPT} tokens", dtype, times, {_COLD: (_WARM,)})


def _requests(kind: str, folder: Path, count: int) -> list[Any]:
    from vllm.lora.request import LoRARequest

    return [LoRARequest(f"{kind}{number}", number, str(folder / kind)) for number in range(1, count + 1)]


def _step(engine: Any, requests: Sequence[Any] | None, rows: int, tokens: int) -> Callable[[], object]:
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [1 + (row * 37 + place * 11) % 200 for place in range(_PROMPT)]} for row in range(rows)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def step() -> None:
        outputs = engine.generate(prompts, greedy, lora_request=requests, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)

    return step
