"""The measuring instruments themselves: order, ratios and counted bytes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bench import measure


def test_rounds_alternate_and_share_the_back_to_back_turn() -> None:
    calls: list[str] = []
    fns = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = measure.interleave(fns, rounds=6, warmup=0)
    assert "".join(calls) == "abc-cba-bca-acb-cab-bac".replace("-", "")
    # Over the six rounds, going round again from the start, each of the three runs twice in a row exactly once.
    repeats = [first for first, second in zip(calls, [*calls[1:], calls[0]], strict=True) if first == second]
    assert {name: repeats.count(name) for name in "abc"} == {"a": 1, "b": 1, "c": 1}
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6, "c": 6}


def test_warmup_is_not_timed_and_calls_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def work() -> None:
        nonlocal now
        now += 2.0

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    assert measure.interleave({"work": work}, rounds=3, warmup=2, calls=5) == {"work": [2.0, 2.0, 2.0]}
    assert now == 2.0 * (2 + 3 * 5)


def test_garbage_collection_is_restored_after_an_error() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        measure.interleave({"fail": fail}, rounds=1, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"warmup": -1}, {"calls": 0}, {"fns": {}}])
def test_interleave_refuses_counts_out_of_range(bad: dict[str, object]) -> None:
    good: dict[str, object] = {"fns": {"f": lambda: None}, "rounds": 1, "warmup": 0}
    with pytest.raises(ValueError, match="give at least one function"):
        measure.interleave(**(good | bad))  # type: ignore[arg-type]


def test_paired_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians() -> None:
    ours, theirs = [1.0, 10.0, 3.0], [2.0, 10.0, 1.0]  # medians 3 and 2; ratios 0.5, 1 and 3
    assert measure.paired_ratio(ours, theirs) == 1.0
    with pytest.raises(ValueError, match="same rounds"):
        measure.paired_ratio(ours, theirs[:2])


def test_interquartile_range() -> None:
    assert measure.interquartile_range([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert measure.interquartile_range([7.0]) == 0.0


def test_saved_bytes_of_a_known_graph() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(4, 16, requires_grad=True)

    def forward() -> torch.Tensor:
        hidden = torch.sigmoid(x * 2.0)  # keeps its output, 8*16 floats; the product by a number keeps nothing
        return torch.nn.functional.linear(hidden, weight).exp()  # hidden again, weight, and exp's output, 8*4 floats

    hidden, out = 8 * 16 * 4, 8 * 4 * 4
    assert measure.saved_bytes(forward, [x, weight]) == hidden + out
    assert measure.saved_bytes(forward, [x]) == hidden + out + 4 * 16 * 4


def test_saved_bytes_counts_the_whole_storage_of_a_view_once() -> None:
    x = torch.randn(10, requires_grad=True)

    def forward() -> torch.Tensor:
        big = torch.sigmoid(x * torch.ones(100, 10))  # keeps ones, and its output
        return (big[:1] * big[:1]).sum() + (big[5:6] ** 2).sum()

    assert measure.saved_bytes(forward, [x]) == 2 * 100 * 10 * 4


def test_saved_bytes_forgets_what_the_forward_dropped() -> None:
    x = torch.randn(64, requires_grad=True)

    def dropped() -> torch.Tensor:
        torch.exp(x)  # its graph dies with it
        return torch.sigmoid(x)

    assert measure.saved_bytes(dropped, [x]) == 64 * 4
    assert measure.saved_bytes(lambda: checkpoint(lambda t: t.exp().sigmoid(), x, use_reentrant=False), [x]) == 0
    with torch.no_grad():
        assert measure.saved_bytes(lambda: torch.sigmoid(x), [x]) == 0


def test_saved_bytes_leaves_backward_correct() -> None:
    x = torch.randn(5, requires_grad=True)
    outputs: list[torch.Tensor] = []
    measure.saved_bytes(lambda: outputs.append(torch.exp(x)), [x])
    outputs[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.exp(x.detach()))


def test_ceilings_count_the_work_that_they_time() -> None:
    copy = measure.copy_bandwidth(1 << 16, rounds=2)
    assert copy.work == 2 << 16
    assert copy.rate == pytest.approx(copy.work * 2 / sum(copy.times))
    assert measure.matmul_rate(torch.float32, size=32, rounds=2).work == 2 * 32**3
