"""Sixty steps on a real task: a character model of Python's manual learns a topic that it has not read.

Ours, an accelerated PEFT model and PEFT start from the same weights and see the same batches. What rounding does to
such a run is measured: PEFT's distance from the same run in fp64, over PEFT itself and over PEFT started one rounding
away. Ours may be as far from fp64 as the worst of these, twice over.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data import topics
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import ia3
from ia3.mlp import patch_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
STEPS, BATCH, LENGTH, CHARACTERS = 60, 8, 48, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEFTS = ("peft", "nudged", "nudged otherwise")
NAMES = ("losses", "vectors", "logits")


def _characters(topic: str) -> Tensor:
    return torch.tensor([min(ord(character), CHARACTERS - 1) for character in topics.topics[topic]])


def _batches(text: Tensor, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - LENGTH, (count, BATCH), generator=generator).tolist()
    return [torch.stack([text[start : start + LENGTH] for start in row]) for row in starts]


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@dataclass(frozen=True)
class Task:
    base: nn.Module
    train: list[Tensor]
    held_out: list[Tensor]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matmuls gain nothing from more, and lose much where another process wants the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> Task:
    """A Llama of 60,000 parameters that has read about special methods, and turns to format strings."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=CHARACTERS,
        max_position_embeddings=LENGTH,
    )
    base = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    for ids in _batches(_characters("specialnames"), 120, seed=1):
        optimizer.zero_grad()
        _loss(base, ids).backward()
        optimizer.step()
    text = _characters("formatstrings")
    middle = 3 * len(text) // 4
    return Task(base.eval(), _batches(text[:middle], STEPS, seed=2), _batches(text[middle:], 4, seed=3))


@dataclass(frozen=True)
class Result:
    """``[STEPS]`` losses; all vectors, end to end; the logits of the held-out text.

    before, after: the mean loss over some of the batches that are trained on, and over the held-out ones.
    """

    losses: Tensor
    vectors: Tensor
    logits: Tensor
    before: tuple[float, float]
    after: tuple[float, float]

    def distances(self, other: Result) -> dict[str, float]:
        return {name: float((getattr(self, name) - getattr(other, name)).norm()) for name in NAMES}


def _ours(base: nn.Module) -> nn.Module:
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
    assert sum(patch_of(block) is not None for block in model.modules()) == 2
    return model


def _peft(base: nn.Module) -> nn.Module:
    model: nn.Module = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))
    return model


def _accelerated(base: nn.Module) -> nn.Module:
    model = ia3.accelerate(_peft(base))
    assert sum(patch_of(block) is not None for block in model.modules()) == 2
    return model


def _nudged(seed: int) -> Callable[[nn.Module], nn.Module]:
    """PEFT's model, whose vectors start one rounding away from ones."""

    def build(base: nn.Module) -> nn.Module:
        model = _peft(base)
        eps = torch.finfo(next(base.parameters()).dtype).eps
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.data += signs * eps / 2
        return model

    return build


def _run(task: Task, dtype: torch.dtype, build: Callable[[nn.Module], nn.Module], is_oracle: bool = False) -> Result:
    base = copy.deepcopy(task.base).to(dtype)
    model = build(base.double() if is_oracle else base)
    if is_oracle:
        model.double()  # the vectors too
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 6
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)

    def measure() -> tuple[float, float]:
        seen, held_out = (
            sum(float(_loss(model, ids).detach()) for ids in batches) / len(batches)
            for batches in (task.train[:8], task.held_out)
        )
        return seen, held_out

    before = measure()
    losses = []
    for ids in task.train:
        optimizer.zero_grad()
        loss = _loss(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        logits = model(input_ids=task.held_out[0], use_cache=False).logits.double()
    vectors = torch.cat([p.detach().double().flatten() for p in parameters])
    return Result(torch.tensor(losses, dtype=torch.float64), vectors, logits, before, measure())


@pytest.fixture(scope="module", params=DTYPES)
def runs(request: pytest.FixtureRequest, task: Task) -> dict[str, Any]:
    dtype = DTYPES[request.param]
    builders = {"ours": _ours, "accelerated": _accelerated} | dict(
        zip(PEFTS, (_peft, _nudged(1), _nudged(2)), strict=True)
    )
    results: dict[str, Any] = {name: _run(task, dtype, build) for name, build in builders.items()}
    return results | {"oracle": _run(task, dtype, _peft, is_oracle=True)}


@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_the_run_is_as_near_to_fp64_as_peft(runs: dict[str, Result], kind: str) -> None:
    errors = {name: run.distances(runs["oracle"]) for name, run in runs.items()}
    for name in NAMES:
        assert errors[kind][name] <= 2 * max(errors[who][name] for who in PEFTS), name


@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_the_run_is_as_near_to_peft_as_peft_to_itself(runs: dict[str, Result], kind: str) -> None:
    """To itself, started one rounding away."""
    spreads = [runs[a].distances(runs[b]) for a, b in itertools.combinations(PEFTS, 2)]
    distances = runs[kind].distances(runs["peft"])
    for name in NAMES:
        assert distances[name] <= 2 * max(spread[name] for spread in spreads), name


def test_an_accelerated_model_trains_to_the_bits_of_ours(runs: dict[str, Result]) -> None:
    assert all(torch.equal(getattr(runs["ours"], name), getattr(runs["accelerated"], name)) for name in NAMES)


@pytest.mark.parametrize("kind", ["ours", "accelerated", "peft"])
def test_the_task_is_learned(runs: dict[str, Result], kind: str) -> None:
    """In what was trained on, and in what was not."""
    result = runs[kind]
    for before, after in zip(result.before, result.after, strict=True):
        assert after < before - 0.05
    assert float((result.vectors - 1).norm()) > 1.0
