"""A tiny model and its adapter, in folders of a test's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ia3

from ..ia3.conftest import BY_NAME, perturb


@pytest.fixture(scope="session")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, ``base``, and an adapter of it, ``adapter``."""
    import transformers

    folder = tmp_path_factory.mktemp("saved")
    shutil.copytree(tiny_model, folder / "base")
    model = ia3.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tiny_model), CONFIG)
    perturb(model)
    model.save_pretrained(folder / "adapter")
    return folder


CONFIG = ia3.IA3Config(task_type="CAUSAL_LM")


@pytest.fixture
def folders(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return copies of the model's and the adapter's folder, to be damaged."""
    for name in ("base", "adapter"):
        shutil.copytree(saved / name, tmp_path / name)
    return tmp_path / "base", tmp_path / "adapter"


@pytest.fixture(scope="session")
def plain(tiny_model: Path) -> nn.Module:
    """Return the model without adapters, which no attack changes."""
    import transformers

    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    return model


@pytest.fixture
def model() -> Any:
    """Return a model with an adapter of its own, whose vectors are far from ones."""
    model = ia3.get_peft_model(BY_NAME["llama"].build(), CONFIG)
    perturb(model)
    return model.eval()
