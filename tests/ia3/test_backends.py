"""A whole model on a backend that the environment names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
import torch, transformers
import ia3, ia3_kernels
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
torch.manual_seed(0)
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False))
print("made")
inputs = dict(input_ids=torch.arange(6).view(1, 6), labels=torch.arange(6).view(1, 6))
"""
STEP = """
model(**inputs).loss.backward()
gradients = [p.grad for p in model.parameters() if p.requires_grad]
before = {name: p.clone() for name, p in model.named_parameters() if "ia3_l" not in name}
with torch.no_grad():
    expected = model(**inputs).logits
    model.merge_adapter()
    merged = model(**inputs).logits
    model.unmerge_adapter()
same = all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
close = torch.allclose(merged, expected, rtol=1e-4, atol=1e-5)
print(len(gradients), all(bool(g.abs().sum() > 0) for g in gradients), same, close)
print(ia3_kernels.explain("gated_activation", "cpu", torch.float32).backend)
"""


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("backend", "environment"),
    [("reference", {}), ("native", {}), ("triton", {"TRITON_INTERPRET": "1"})],
)
def test_a_model_trains_and_merges_on_it(backend: str, environment: dict[str, str]) -> None:
    if backend == "native":
        from ia3_kernels import backends

        if backends.native.BACKEND.unavailable():
            pytest.skip("the native library is not built")
    done = _run(MODEL + STEP, IA3_BACKEND=backend, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["3 True True True", backend]


def test_one_that_is_missing_is_said_by_the_first_operator_and_not_before() -> None:
    done = _run(MODEL + "model(**inputs)", IA3_BACKEND="cuda")
    assert done.stdout.splitlines()[-1] == "made", done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: ia3_kernels: the backend 'cuda' was asked for by name, but ")
