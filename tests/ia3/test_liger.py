"""Liger's patches beside ours, in either order: whoever computes a block, the report says so, and nobody is lost.

Liger's Triton kernels need a GPU. Here its own functions patch the model, and its SwiGLU kernel alone is stood in for
by the formula that it computes; what else it patches is looked at, and not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import ia3
from ia3.mlp import patch_of

liger = pytest.importorskip("liger_kernel.transformers")
from liger_kernel.transformers import swiglu as liger_swiglu  # noqa: E402
from liger_kernel.transformers.model.llama import lce_forward  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
KINDS = ("ours", "accelerated")
ONLY_MLP = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": False, "swiglu": True}
ALL_BUT_MLP = {name: not value for name, value in ONLY_MLP.items()}


@pytest.fixture
def apply_liger(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Liger's function for Llama models; what it does to classes and modules is undone afterwards."""
    for name in ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    causal = modeling_llama.LlamaForCausalLM
    monkeypatch.setattr(causal, "forward", causal.forward)
    function: Callable[..., None] = liger.apply_liger_kernel_to_llama
    return function


@pytest.fixture
def liger_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that Liger's SwiGLU kernel would have computed; the formula stands in for it."""
    calls: list[tuple[int, ...]] = []

    def formula(gate: Tensor, up: Tensor) -> Tensor:
        calls.append(tuple(gate.shape))
        return F.silu(gate) * up

    monkeypatch.setattr(liger_swiglu, "_swiglu_dispatch", formula)
    return calls


def make(kind: str, base: nn.Module) -> Any:
    """A model with vectors far from ones."""
    package: Any = ia3 if kind == "ours" else peft
    torch.manual_seed(4)
    model = package.get_peft_model(base, package.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False))
    return model if kind == "ours" else ia3.accelerate(model)


def take_out(kind: str, model: Any) -> nn.Module:
    """The base model, with nothing of ours in it."""
    base: nn.Module = model.unload() if kind == "ours" else ia3.decelerate(model).unload()
    return base


def results(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    result = model(**inputs)
    result.loss.backward()
    return [result.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def down_rows(model: nn.Module) -> list[ia3.ReportRow]:
    return [row for row in ia3.report(model).rows if row.kind == "input"]


def patched(model: nn.Module) -> int:
    return sum(patch_of(block) is not None for block in model.modules())


@pytest.mark.parametrize("when", ["class before", "instance before", "instance after"])
@pytest.mark.parametrize("kind", KINDS)
def test_ligers_block_runs_and_the_report_says_so(
    families: dict[str, Any],
    apply_liger: Callable[..., None],
    liger_calls: list[tuple[int, ...]],
    kind: str,
    when: str,
) -> None:
    family = families["llama"]
    expected = results(make(kind, family.build()), family.inputs())
    assert not liger_calls
    if when == "class before":
        apply_liger(**ONLY_MLP)
    base = family.build()
    if when == "instance before":
        apply_liger(model=base, **ONLY_MLP)
    model = make(kind, base)
    assert patched(model) == (2 if when == "instance after" else 0)
    if when == "instance after":
        apply_liger(model=base, **ONLY_MLP)
        assert patched(model) == 0

    actual = results(model, family.inputs())
    assert liger_calls == [(2, 7, 48)] * 2
    assert len(actual) == len(expected) == 7
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=64 * 2**-24 * float(b.abs().max()))
    rows = down_rows(model)
    assert len(rows) == 2
    reason = "no row of the table describes the block" if when == "class before" else "forward of the block is another"
    assert all(row.runs.startswith("scaled_linear") and f"not fused: {reason}" in row.reason for row in rows)

    plain = take_out(kind, model)
    liger_calls.clear()
    plain(**family.inputs())
    assert len(liger_calls) == 2  # Liger's patch outlives ours


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_else_of_ligers_composes(
    families: dict[str, Any], apply_liger: Callable[..., None], kind: str, order: str
) -> None:
    """With ``swiglu=False`` both are in place: Liger's norms, rotary embedding and loss, and our fused blocks."""
    base = families["llama"].build()
    if order == "before":
        apply_liger(model=base, **ALL_BUT_MLP)
    model = make(kind, base)
    if order == "after":
        apply_liger(model=base, **ALL_BUT_MLP)

    def check_liger() -> None:
        norm = liger.LigerRMSNorm
        assert base.forward.__func__ is lce_forward
        assert modeling_llama.apply_rotary_pos_emb is liger.liger_rotary_pos_emb
        for layer in base.model.layers:
            assert layer.input_layernorm.forward.__func__ is norm.forward
            assert layer.post_attention_layernorm.forward.__func__ is norm.forward

    assert patched(model) == 2
    assert all(row.reason.startswith("fused into LlamaMLP") for row in down_rows(model))
    check_liger()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert patched(model) == 2
    check_liger()
    take_out(kind, model)
    assert patched(base) == 0
    check_liger()


@pytest.mark.parametrize("is_mlp_ligers", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_applies_liger_to_our_models(
    families: dict[str, Any],
    apply_liger: Callable[..., None],
    liger_calls: list[tuple[int, ...]],
    kind: str,
    is_mlp_ligers: bool,
    tmp_path: Path,
) -> None:
    ids = torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(7)).tolist()
    model = make(kind, families["llama"].build())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        use_liger_kernel=True,
        liger_kernel_config=ONLY_MLP | {"swiglu": is_mlp_ligers},
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    assert len(liger_calls) == (4 if is_mlp_ligers else 0)
    assert patched(model) == (0 if is_mlp_ligers else 2)
    assert all(row.reason.startswith("not fused") == is_mlp_ligers for row in down_rows(model))
