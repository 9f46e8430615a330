"""The report says of every scaled layer what runs it, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.ia3 import IA3Layer
from torch import nn

import ia3
import ia3_kernels


def test_every_layer_has_a_row(family: Any, adapted: Callable[..., ia3.PeftModel]) -> None:
    model = adapted(family)
    report = ia3.report(model)
    layers = [name for name, module in model.get_base_model().named_modules() if isinstance(module, IA3Layer)]
    assert [row.module for row in report.rows] == layers
    assert ia3.report(model.get_base_model()).rows == report.rows


def test_rows_name_operator_backend_and_reason(families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]) -> None:
    rows = {row.module: row for row in ia3.report(adapted(families["llama"], torch.bfloat16)).rows}
    key, down = rows["model.layers.0.self_attn.k_proj"], rows["model.layers.0.mlp.down_proj"]
    choice = ia3_kernels.explain("gated_activation", "cpu", torch.bfloat16)
    assert (key.kind, key.runs.split()[0]) == ("output", "scaled_linear")
    assert (down.kind, down.runs) == ("input", f"gated_activation ({choice.backend})")
    assert down.reason.startswith("fused into LlamaMLP (gated)")
    assert choice.reason in down.reason

    open_block = next(r for r in ia3.report(adapted(families["opt"])).rows if r.kind == "input")
    assert open_block.runs.startswith("scaled_linear")
    assert "no row of the table" in open_block.reason


def test_the_report_is_of_this_moment(families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]) -> None:
    model = adapted(families["llama"])
    block = model.get_base_model().model.layers[0].mlp
    handle = block.act_fn.register_forward_hook(lambda *_: None)
    row = next(row for row in ia3.report(model).rows if row.module == "model.layers.0.mlp.down_proj")
    assert row.runs.startswith("scaled_linear")
    assert "SiLUActivation has hooks" in row.reason
    handle.remove()
    nn.utils.parametrizations.weight_norm(block.down_proj.base_layer)
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    nn.utils.parametrizations.weight_norm(layer.base_layer)
    rows = {row.module: row for row in ia3.report(model).rows}
    assert "computes its own product" in rows["model.layers.0.self_attn.v_proj"].reason
    with model.disable_adapter():
        assert {row.reason for row in ia3.report(model).rows} == {"the adapter is disabled"}


def test_the_text_is_a_table_that_folds_layers(families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]) -> None:
    lines = str(ia3.report(adapted(families["llama"]))).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["layers", "module"],
        ["2", "model.layers.*.self_attn.k_proj"],
        ["2", "model.layers.*.self_attn.v_proj"],
        ["2", "model.layers.*.mlp.down_proj"],
    ]
