"""`ia3 tune`: which shapes it measures, what it keeps, and what it says with no GPU. The measuring itself needs one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ia3.cli import tune as command
from ia3.cli.app import main
from ia3.planning import plan_adapter
from ia3_kernels import routes, target, tune
from ia3_kernels.launches import Architecture, linear_launch
from ia3_kernels.routes import Measurement, Product


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", "--shape", "64x64"]) == 2
    assert "there is no GPU that torch can use" in capsys.readouterr().err


ARCHITECTURE = Architecture("cuda", 80, 108)
# Imported before a GPU is made up: packages that transformers imports with them would look at it.
MODELS = (LlamaForCausalLM, GPT2LMHeadModel, Qwen3MoeForCausalLM, plan_adapter)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Product, torch.dtype]]:
    """A GPU that measures nothing but remembers what it was asked for; our kernel wins up to 16 rows."""
    asked: list[tuple[Product, torch.dtype]] = []

    def measure(index: int, product: Product, dtype: torch.dtype) -> Measurement:
        asked.append((product, dtype))
        launch = linear_launch(product.rows, product.outputs, product.inputs, 2, ARCHITECTURE, True)
        return Measurement(2e-5, 1e-5 if product.rows <= 16 else 3e-5, launch)

    monkeypatch.setenv(target.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(target, "triton_problem", lambda: None)
    monkeypatch.setattr(target, "architecture", lambda index: ARCHITECTURE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Imaginary GPU 1000")
    monkeypatch.setattr(tune, "measure_linear", measure)
    routes.tuned.cache_clear()
    return asked


def _route(rows: int) -> routes.Route:
    return routes.linear_route(0, Product("output", rows, 1024, 3072, 2, False), {"triton"}, is_captured=True)


def test_what_it_measures_is_kept_and_decides_the_route(gpu: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--shape", "1024x3072", "--rows", "4", "--rows", "512"]) == 0
    wanted = [
        Product(side, rows, 1024, 3072, 2, False) for side, rows in itertools.product(("input", "output"), (4, 512))
    ]
    assert gpu == [(product, torch.bfloat16) for product in wanted]
    assert "Imaginary GPU 1000" in capsys.readouterr().out
    assert {rows: _route(rows).name for rows in (1, 4, 9, 200, 512, 8192)} == dict.fromkeys((1, 4, 9), "triton") | (
        dict.fromkeys((200, 512, 8192), "library")
    )
    assert "not measured" in _route(8192).reason
    assert main(["tune", "--shape", "64x64", "--rows", "1"]) == 0  # adds to what is there
    assert _route(4).name == "triton"
    assert "measured by ia3 tune, rows 4" in _route(4).reason


def test_cuda_kernels_are_enough(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "triton_problem", lambda: "there is no Triton.")
    monkeypatch.setattr(target, "cuda_problem", lambda: None)
    assert main(["tune", "--shape", "64x64", "--rows", "1"]) == 0
    assert len(gpu) == 2


def test_the_library_alone_is_nothing_to_measure(
    gpu: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kernels in ("triton", "cuda"):
        monkeypatch.setattr(target, f"{kernels}_problem", lambda kernels=kernels: f"there is no {kernels}.")
    assert main(["tune", "--shape", "64x64"]) == 2
    complaint = " ".join(capsys.readouterr().err.split())
    assert "nothing but the library's matmul to measure here: there is no triton. there is no cuda." in complaint
    assert not gpu


def test_what_it_finds_of_another_version_is_not_added_to(gpu: list[Any]) -> None:
    path = routes.path_of(0)
    old = {Product("output", 8, 5, 5, 2, False): Measurement(1.0)}
    routes.write(path, routes.identity(0) | {"torch": "1.0"}, old)
    assert main(["tune", "--shape", "64x64", "--rows", "1"]) == 0
    assert {product.outputs for product in routes.read(path, routes.identity(0))} == {64}


def test_doctor_says_which_files_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says of a GPU that is there is in tests/ia3_kernels/test_routes.py."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv(target.CACHE_VARIABLE, str(tmp_path))
    (tmp_path / "old.json").write_text("{}")
    assert main(["doctor"]) == 0
    said = f"ia3 tune's {tmp_path / 'old.json'}: ignored, because there is no GPU that torch can use."
    assert said in capsys.readouterr().out


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
            {("output", 32, 64, False), ("input", 64, 96, False)},
        ),
        (
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=32),
            {("output", 96, 32, True), ("input", 32, 48, True)},
        ),
        (
            Qwen3MoeConfig(
                hidden_size=64,
                intermediate_size=96,
                moe_intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                num_experts=4,
                vocab_size=32,
            ),
            {("output", 32, 64, False)},
        ),
    ],
    ids=["llama", "gpt2", "qwen3_moe"],
)
def test_a_model_folder_tells_its_shapes(
    gpu: list[Any], tmp_path: Path, config: Any, shapes: set[tuple[str, int, int, bool]]
) -> None:
    config.save_pretrained(tmp_path / "model")
    assert main(["tune", str(tmp_path / "model"), "--rows", "1"]) == 0
    found = {(product.side, product.outputs, product.inputs, product.is_transposed) for product, _ in gpu}
    assert found == shapes


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--shape", "1024"], "expected OUTxIN"),
        (["--shape", "0x5"], "expected OUTxIN"),
        ([], "there are no shapes to measure"),
        (["nowhere"], "nowhere does not exist; MODEL is a model folder"),
        (["--shape", "4x4", "--rows", "0"], "is below 1"),
    ],
)
def test_mistakes_are_sentences(
    gpu: list[Any], capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert main(["tune", *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not gpu


def test_every_row_count_is_answered_by_default() -> None:
    for rows in range(1, 65537):
        product = Product("output", rows, 8, 8, 2, False)
        measured = [replace(product, rows=count) for count in command.ROWS]
        nearest = min((other for other in measured if other.kind == product.kind), key=product.octaves)
        assert product.octaves(nearest) <= 2


def test_launches_worth_a_try_begin_with_the_computed_one() -> None:
    for rows, capability in itertools.product(command.ROWS, (80, 90)):
        architecture = Architecture("cuda", capability, 108)
        launches = tune.launches(rows, 1024, 3072, 2, architecture, True)
        assert launches[0] == linear_launch(rows, 1024, 3072, 2, architecture, True)
        assert len(launches) == len(set(launches)) > 4
