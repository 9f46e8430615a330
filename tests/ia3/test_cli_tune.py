"""`ia3 tune`: which shapes it measures, what it keeps, and what it says with no GPU. The measuring itself needs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ia3.cli import main
from ia3.cli import tune as command
from ia3_kernels import routes, target, tune
from ia3_kernels.launches import Architecture, linear_launch
from ia3_kernels.routes import Measurement


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", "--shape", "64x64"]) == 2
    assert "there is no GPU that torch can use" in capsys.readouterr().err


# Imported before a GPU is made up: packages that transformers imports with them would look at it.
MODELS = (LlamaForCausalLM, GPT2LMHeadModel)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """A GPU that measures nothing but remembers what it was asked for; our kernel wins up to 16 rows."""
    asked: list[tuple[Any, ...]] = []

    def measure(index: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype, is_transposed: bool) -> Any:
        asked.append((rows, outputs, inputs, dtype, is_transposed))
        launch = linear_launch(rows, outputs, inputs, 2, Architecture("cuda", 90, 132), True)
        return Measurement(2e-5, 1e-5 if rows <= 16 else 3e-5, launch)

    monkeypatch.setenv(target.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(target, "triton_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Imaginary GPU 1000")
    monkeypatch.setattr(tune, "measure_linear", measure)
    routes.of_device.cache_clear()
    return asked


def test_what_it_measures_is_kept_and_decides_the_route(gpu: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--shape", "1024x3072", "--rows", "4", "--rows", "512"]) == 0
    assert gpu == [(4, 1024, 3072, torch.bfloat16, False), (512, 1024, 3072, torch.bfloat16, False)]
    assert "Imaginary GPU 1000" in capsys.readouterr().out
    chosen = {rows: routes.linear_route(0, rows, 1024, 3072, torch.bfloat16, False) for rows in (3, 4, 512, 4096)}
    assert [chosen[rows].name for rows in (3, 4, 512, 4096)] == ["triton", "triton", "library", "library"]
    assert "not measured" in chosen[4096].reason
    assert main(["tune", "--shape", "64x64", "--rows", "1"]) == 0  # adds to what is there
    assert routes.linear_route(0, 4, 1024, 3072, torch.bfloat16, False)[0] == "triton"


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (
            LlamaConfig(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=32,
            ),
            {(32, 64, False), (64, 96, False)},
        ),
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=32), {(96, 32, True), (32, 48, True)}),
    ],
    ids=["llama", "gpt2"],
)
def test_a_model_folder_tells_its_shapes(
    gpu: list[Any], tmp_path: Path, config: Any, shapes: set[tuple[int, int, bool]]
) -> None:
    config.save_pretrained(tmp_path / "model")
    assert main(["tune", str(tmp_path / "model"), "--rows", "1"]) == 0
    assert {(outputs, inputs, is_transposed) for _, outputs, inputs, _, is_transposed in gpu} == shapes


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--shape", "1024"], "expected OUTxIN"),
        (["--shape", "0x5"], "expected OUTxIN"),
        ([], "there are no shapes to measure"),
        (["nowhere"], "there is no config.json in nowhere"),
        (["--shape", "4x4", "--rows", "0"], "is below 1"),
    ],
)
def test_mistakes_are_sentences(
    gpu: list[Any], capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert main(["tune", *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not gpu


def test_every_row_count_has_a_default() -> None:
    assert list(command.ROWS) == sorted(command.ROWS)
    for rows in command.ROWS:
        for capability in (80, 90):
            launches = tune.launches(rows, 1024, 3072, 2, Architecture("cuda", capability, 108), True)
            assert launches[0] == linear_launch(rows, 1024, 3072, 2, Architecture("cuda", capability, 108), True)
            assert len(launches) == len(set(launches)) > 4
