"""Batches whose rows have adapters of their own: 64 rows with 1, 8 and 64 adapters, with 64 of 1,000, and with none.

Compared with plain transformers, which has no adapter at all, with one batch after the other for each adapter, and with
PEFT's mixed batches of LoRA adapters, which it does not have for IA3.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import ia3

from .. import llama
from ..measure import interleave
from ..records import Recorder
from ..settings import DTYPES, Settings

_SUITE = "mixed"
_ROWS = 64
_WARMUP = 4
_RANK = 16
_LORA = f"peft lora rank {_RANK}, {_ROWS} adapters"

_Step = Callable[[], Tensor]


def run(settings: Settings, recorder: Recorder) -> None:
    """Measures decoding and prefill, and decoding while adapters come and go; decoding also of a model that exists."""
    for dtype in settings.dtypes:
        _model(settings, recorder, dtype, llama.config(settings), (("decode", 1, 20), ("prefill", 32, 6)), traffic=True)
        if not settings.quick:
            _model(settings, recorder, dtype, llama.smollm2(), (("decode", 1, 6),))


def _model(
    settings: Settings,
    recorder: Recorder,
    dtype: str,
    config: LlamaConfig,
    phases: Sequence[tuple[str, int, int]],
    traffic: bool = False,
) -> None:
    """One model, in phases of a name, tokens a row, and rounds."""
    resident = 100 if settings.quick else 1000
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(settings.device, DTYPES[dtype]).eval().requires_grad_(False)
    ours = ia3.get_peft_model(copy.deepcopy(base), ia3.IA3Config(task_type=ia3.TaskType.CAUSAL_LM)).eval()
    lora = _lora(base)
    with torch.inference_mode(), ia3.AdapterBank(ours, resident) as bank:
        for number, vectors in zip(range(resident), _adapters(ours), strict=False):
            bank.load(f"{number}", vectors)
        for phase, tokens, rounds in phases:
            inputs = _Inputs(settings, config, tokens, rounds)
            _check(inputs, ours)
            times = interleave(
                _steps(inputs, base, ours, lora, resident), settings.rounds(rounds), _WARMUP, device=settings.device
            )
            case = f"{llama.describe(config)}, {phase}, {_ROWS} rows of {tokens} token{'s' if tokens > 1 else ''}"
            baselines = {impl: [name for name in ("base", _LORA) if name != impl] for impl in times}
            recorder.add_times(_SUITE, case, dtype, times, baselines)
        if traffic:
            _traffic(settings, recorder, dtype, _Inputs(settings, config, 1, 0), ours, bank)


def _lora(base: nn.Module) -> Any:
    """PEFT's model with adapters of the layers that ours scale; None where PEFT is not installed."""
    if not llama.has("peft"):
        return None
    import peft

    config = peft.LoraConfig(
        r=_RANK,
        target_modules=["k_proj", "v_proj", "down_proj"],
        task_type=peft.TaskType.CAUSAL_LM,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(copy.deepcopy(base), config, "0")
    for number in range(1, _ROWS):
        model.add_adapter(f"{number}", config)
    return model.eval()


def _adapters(model: ia3.PeftModel) -> Iterator[Mapping[str, Tensor]]:
    """Adapters one after the other, without end, each with vectors of its own around one."""
    generator = torch.Generator().manual_seed(2)
    shapes = {name: vector.shape for name, vector in ia3.get_peft_model_state_dict(model).items()}
    while True:
        yield {name: 1 + 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class _Inputs:
    """The tokens of a step; for decoding, also a context that a static cache holds before it."""

    def __init__(self, settings: Settings, config: LlamaConfig, tokens: int, rounds: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self._config = config
        self.tokens = torch.randint(config.vocab_size, (_ROWS, tokens), generator=generator).to(settings.device)
        self._context = 0 if tokens > 1 else 8 if settings.quick else 128
        # A static cache costs the same at every position: attention runs over all of its slots, under a mask.
        self._slots = self._context + 1 + _WARMUP + settings.rounds(rounds)

    def step(self, model: nn.Module, mixes: Sequence[Sequence[str]] = (), rows: slice = slice(None)) -> _Step:
        """Runs `rows` of the batch, each time with the next of `mixes`; in decoding one position further."""
        tokens, turns = self.tokens[rows], itertools.cycle(mixes or [[]])
        cache = StaticCache(self._config, max_cache_len=self._slots) if self._context else None

        def forward(tokens: Tensor) -> Tensor:
            names = next(turns)
            arguments: dict[str, Any] = {"adapter_names": list(names)} if names else {}
            result = model(
                input_ids=tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1, **arguments
            )
            logits: Tensor = result.logits
            return logits

        if self._context:
            forward(tokens[:, :1].expand(-1, self._context))
        return lambda: forward(tokens)


def _mix(count: int, start: int = 0) -> list[str]:
    """The names of `count` adapters, spread over the rows."""
    return [f"{start + row % count}" for row in range(_ROWS)]


def _steps(inputs: _Inputs, base: nn.Module, ours: ia3.PeftModel, lora: Any, resident: int) -> dict[str, _Step]:
    steps = {"base": inputs.step(base)}
    for count in (1, 8, _ROWS):
        steps[f"ours, {count} adapter{'s' if count > 1 else ''}"] = inputs.step(ours, [_mix(count)])
    others = [_mix(_ROWS, start) for start in range(0, resident - _ROWS + 1, _ROWS)]  # cold: others at every step
    steps[f"ours, {_ROWS} of {resident} adapters"] = inputs.step(ours, others)
    single = [inputs.step(ours, [[name]], slice(row, row + 1)) for row, name in enumerate(_mix(_ROWS))]
    steps[f"ours, a batch for each of {_ROWS}"] = lambda: torch.cat([step() for step in single])
    if lora is not None:
        steps[_LORA] = inputs.step(lora, [_mix(_ROWS)])
    return steps


def _check(inputs: _Inputs, ours: ia3.PeftModel) -> None:
    """Raises RuntimeError unless rows of a mixed batch compute what they compute alone: no speed of wrong results."""
    names = _mix(_ROWS)
    together = inputs.step(ours, [names])().double()
    # Other shapes, other orders of summation: as far apart as two roundings of everything on the way.
    tolerance = 2 * torch.finfo(next(ours.parameters()).dtype).eps * 40**0.5
    for row in range(0, _ROWS, 16):
        alone = inputs.step(ours, [names[row : row + 1]], slice(row, row + 1))().double()
        error = float((together[row : row + 1] - alone).norm() / alone.norm())
        if not error <= tolerance:
            raise RuntimeError(
                f"row {row} of a mixed batch and the same row alone differ by {error:.2g} (relative; expected at most "
                f"{tolerance:.2g}), so the times mean nothing; run the tests first"
            )


def _traffic(
    settings: Settings, recorder: Recorder, dtype: str, inputs: _Inputs, ours: ia3.PeftModel, bank: ia3.AdapterBank
) -> None:
    """Decoding while another thread loads and unloads adapters, and what one load takes meanwhile."""
    count = 50 if settings.quick else 10_000
    few = list(itertools.islice(_adapters(ours), 16))
    loads: list[float] = []

    def come_and_go() -> None:
        for number in range(count):
            start = time.perf_counter()
            bank.load("passing", few[number % len(few)])
            loads.append(time.perf_counter() - start)
            bank.unload("passing")

    names = _mix(_ROWS)

    def prefill() -> float:
        start = time.perf_counter()
        ours(input_ids=inputs.tokens, use_cache=False, logits_to_keep=1, adapter_names=names)
        return time.perf_counter() - start

    quiet = [prefill() for _ in range(settings.rounds(100))]
    thread = threading.Thread(target=come_and_go)
    thread.start()
    busy = [prefill()]
    while thread.is_alive():
        busy.append(prefill())
    thread.join()
    case = f"{count:,} adapters loaded and unloaded meanwhile, {_ROWS} rows of 1 token"
    recorder.add(_SUITE, case, dtype, "a step before", times=quiet)
    ratio = statistics.median(busy) / statistics.median(quiet)
    recorder.add(_SUITE, case, dtype, "a step meanwhile", times=busy, ratios={"a step before": ratio})
    recorder.add(_SUITE, case, dtype, "one load", times=loads)
