"""Every Python snippet of README and docs runs, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import ia3
import ia3_kernels

from .ia3.helpers import word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(_snippets(ROOT / "README.md")) >= 5


@pytest.mark.parametrize("page", [page for page in PAGES if _snippets(page)], ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")
def test_snippets_run_in_their_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained("path/to/llama")

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained("path/to/llama")

    for name in ("french", "german", "fr", "de", "it"):
        ia3.get_peft_model(base(), ia3.IA3Config(task_type="CAUSAL_LM")).save_pretrained(f"adapters/{name}")

    inputs = {"input_ids": torch.ones(3, 4, dtype=torch.long), "max_new_tokens": 2}
    names: dict[str, Any] = {"ia3": ia3, "peft": peft, "torch": torch, "inputs": inputs, "batch": inputs}
    x, wide = torch.randn(3, 8), torch.randn(3, 12)
    names |= {"x": x, "weight": torch.randn(6, 8), "bias": torch.randn(6), "gate": wide, "up": wide}
    names |= {"ia3_kernels": ia3_kernels, "scale": torch.rand(6) + 0.5, "other": torch.rand(6) + 0.5, "dim": 0}
    names |= {"w_gate": torch.randn(12, 8), "w_up": torch.randn(12, 8), "w_down": torch.randn(8, 12)}
    if page.name == "trl.md":
        datasets = pytest.importorskip("datasets")
        names |= {"prompts": datasets.Dataset.from_list([{"prompt": "a b"}]), "tokenizer": word_tokenizer()}
        names["reward"] = lambda completions, **other: [float(len(text)) for text in completions]
    for snippet in _snippets(page):
        names["base"] = base()
        for part in re.split(r"\n(?=h = |y = gated_mlp)", snippet):  # operators of several widths
            names["s"] = torch.ones(6 if "output_scale=s" in part else 12)
            code = part if "liger" not in part else ""
            exec(compile(code, str(page), "exec"), names)
