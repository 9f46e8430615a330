"""Threads and coroutines that use one model at once: right results, or a sentence, and nothing that stays."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ia3

from ..ia3.conftest import BY_NAME, perturb
from .conftest import CONFIG
from .harness import bounds, refused

IDS = BY_NAME["llama"].inputs()["input_ids"]
ROUNDS = 25
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of merging what is merged


@pytest.fixture
def larger() -> Any:
    """Return a model whose merge takes longer than a thread's turn, with two adapters."""
    model = ia3.get_peft_model(BY_NAME["llama"].build(hidden_size=128, intermediate_size=512), CONFIG)
    model.add_adapter("other", CONFIG)
    perturb(model)
    return model.eval()


@torch.no_grad()
def logits(model: Any, **more: Any) -> Tensor:
    return model(input_ids=IDS, **more).logits  # type: ignore[no-any-return]


def together(*jobs: Callable[[], object], rounds: int = ROUNDS) -> list[BaseException]:
    """Run each job in a thread, again and again; return what they raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> None:
        start.wait()
        for _ in range(rounds):
            try:
                job()
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    with bounds(seconds=60, nbytes=2 << 30):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return errors


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CHANGES: dict[str, Callable[[Any], object]] = {
    "merge": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "safely": lambda model: (model.merge_adapter(safe_merge=True), model.unmerge_adapter()),
    "swap": lambda model: swapped(model),
    "switch": lambda model: switched(model),
    "merge-and-switch": lambda model: (model.merge_adapter(), switched(model), model.unmerge_adapter()),
}


def swapped(model: Any) -> None:
    with contextlib.suppress(ia3.IA3Error):  # another thread has unmerged it
        model.merge_adapter(["default"])
        model.base_model.swap_adapter("default", "default")
    model.unmerge_adapter()


def switched(model: Any) -> None:
    with model.disable_adapter():
        pass


@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_two_threads_that_change_the_weights(first: str, second: str, larger: Any) -> None:
    before, right = state(larger), logits(larger)
    errors = together(lambda: CHANGES[first](larger), lambda: CHANGES[second](larger), rounds=8)
    assert all(isinstance(error, ia3.IA3Error) for error in errors), errors
    larger.unmerge_adapter()
    assert same(larger, before)
    assert torch.equal(logits(larger), right)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("change", ["merge", "safely", "swap"])
def test_a_thread_that_merges_while_others_compute(change: str, call: str, larger: Any) -> None:
    before, right = state(larger), logits(larger)
    tokens = larger.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    worst = [0.0]

    def compute() -> None:
        if call == "forward":
            worst[0] = max(worst[0], float((logits(larger) - right).abs().max()))
        else:
            found = larger.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
            worst[0] = max(worst[0], float((found != tokens).any()))

    assert together(compute, compute, lambda: CHANGES[change](larger), rounds=10) == []
    assert worst[0] <= 1e-4 * float(right.abs().max())
    assert same(larger, before)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("is_merged", [False, True])
def test_threads_in_blocks_without_adapters(is_merged: bool, count: int, larger: Any) -> None:
    if is_merged:
        larger.merge_adapter()
    right = logits(larger)
    with larger.disable_adapter():
        base = logits(larger)
    differ: list[bool] = []

    def job() -> None:
        with larger.disable_adapter():
            differ.append(not torch.equal(logits(larger), base))

    assert together(*[job] * count, rounds=6) == []
    assert not any(differ)
    assert torch.equal(logits(larger), right)
    assert larger.get_model_status().enabled is True


def test_blocks_without_adapters_are_nested_and_left_in_any_order(model: Any) -> None:
    right = logits(model)
    first, second = model.disable_adapter(), model.disable_adapter()
    first.__enter__()
    base = logits(model)
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model), base)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), right)


def test_weights_are_not_merged_under_rows_with_adapters_of_their_own(larger: Any) -> None:
    with larger.base_model.route(["default", "other"]):
        right = logits(larger)
        for change in (larger.merge_adapter, larger.merge_and_unload):
            refused(change, "leave the route first")
        assert torch.equal(logits(larger), right)
    larger.merge_adapter()
    refused(lambda: larger.base_model.route(["default", "other"]).__enter__(), "unmerge_adapter first")
    larger.unmerge_adapter()


# --- coroutines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["as they came", "the other way", "nested", "one fails", "one is cancelled"])
def test_coroutines_each_in_a_route(order: str, larger: Any) -> None:
    rows = {name: logits(larger, adapter_names=[name] * 2) for name in ("default", "other", "__base__")}
    alone = logits(larger)
    leave = {"default": asyncio.Event, "other": asyncio.Event}

    async def run(name: str, entered: asyncio.Event, others: asyncio.Event, last: bool) -> Tensor:
        with larger.base_model.route([name] * 2):
            entered.set()
            await others.wait()
            found = logits(larger)
            if last:
                await asyncio.sleep(0.01)
            if order == "one fails" and name == "default":
                raise KeyError
            if order == "one is cancelled" and name == "default":
                await asyncio.sleep(3600)
            return found

    async def both() -> list[Any]:
        entered = {name: asyncio.Event() for name in leave}
        first = asyncio.create_task(run("default", entered["default"], entered["other"], order == "the other way"))
        second = asyncio.create_task(run("other", entered["other"], entered["default"], order == "as they came"))
        await asyncio.gather(*(event.wait() for event in entered.values()))
        outside = logits(larger)
        if order == "one is cancelled":
            await asyncio.wait([second])
            first.cancel()
        return [*await asyncio.gather(first, second, return_exceptions=True), outside]

    with bounds(seconds=20):
        default, other, outside = asyncio.run(both())
    if order in ("one fails", "one is cancelled"):
        assert isinstance(default, KeyError | asyncio.CancelledError)
    else:
        assert torch.equal(default, rows["default"])
    assert torch.equal(other, rows["other"])
    assert torch.equal(outside, alone)
    assert torch.equal(logits(larger), alone)
    assert not larger.base_model.gate.routes


def test_routes_of_one_context_are_left_in_any_order(larger: Any) -> None:
    alone = logits(larger)
    rows = {name: logits(larger, adapter_names=[name] * 2) for name in ("default", "other")}
    first, second = (larger.base_model.route([name] * 2) for name in ("default", "other"))
    first.__enter__()
    second.__enter__()
    assert torch.equal(logits(larger), rows["other"])
    first.__exit__()
    assert torch.equal(logits(larger), rows["other"])
    second.__exit__()
    assert torch.equal(logits(larger), alone)


@pytest.mark.parametrize("count", [2, 6])
def test_threads_each_in_a_route(count: int, larger: Any) -> None:
    names = [("default", "other", "__base__")[number % 3] for number in range(count)]
    rows = {name: logits(larger, adapter_names=[name] * 2) for name in names}
    differ: list[bool] = []

    def job(name: str) -> None:
        with larger.base_model.route([name] * 2):
            differ.append(not torch.equal(logits(larger), rows[name]))

    assert together(*(lambda name=name: job(name) for name in names), rounds=8) == []  # type: ignore[misc]
    assert not any(differ)


def test_a_merge_out_of_a_forward_does_not_wait_for_itself(larger: Any) -> None:
    """Nor for another that waits for it: one of the two gets a sentence."""
    layer = larger.get_base_model().model.layers[0]
    errors: list[str] = []

    def merge(*_: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                larger.merge_adapter()
                larger.unmerge_adapter()
        except ia3.IA3Error as error:
            errors.append(str(error))

    handle = layer.register_forward_pre_hook(merge)
    try:
        assert together(lambda: logits(larger), lambda: logits(larger), rounds=4) == []
    finally:
        handle.remove()
    assert all("another thread" in error for error in errors)
