"""What runs where, and why: the answer to "is it fast here, and if not, what is in the way?"."""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import ia3_kernels

from .blocks import Row, row_of
from .experts import ExpertsMatrix
from .layers import ScaledLayer, acting_adapters, plain_weight, vectors_of
from .merging.quantized import error_of
from .mlp import obstacle, patch_of
from .probing import is_scaled

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportRow:
    """One scaled layer: its name, the side of its vector, what computes it, and why."""

    module: str
    kind: str
    runs: str
    reason: str


@dataclass(frozen=True)
class Report:
    """One row per scaled layer; as text, a table in which layers that differ only by their numbers share a line."""

    rows: list[ReportRow]

    def __str__(self) -> str:
        header = ("layers", "module", "kind", "runs", "reason")
        groups = Counter((re.sub(r"\b\d+\b", "*", row.module), row.kind, row.runs, row.reason) for row in self.rows)
        lines = [header, *((str(count), *group) for group, count in groups.items())]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def report(model: nn.Module) -> Report:
    """List every scaled layer of ``model`` and how it runs now.

    model: an ``IA3Model``, a ``peft.PeftModel``, or the base model of either.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    blocks = _blocks(base)
    layers = ((path, layer) for path, layer in base.named_modules() if is_scaled(layer))
    # What runs over packed weights: the model's dtype.
    dtype = getattr(base, "dtype", torch.float32)
    return Report([_row(path, layer, blocks.get(id(layer)), dtype) for path, layer in layers])


def log_report(model: nn.Module) -> None:
    """Write the report to the log, where somebody reads it at level INFO."""
    if _logger.isEnabledFor(logging.INFO):
        _logger.info("accelerated:\n%s", report(model))


def _blocks(model: nn.Module) -> dict[int, tuple[nn.Module, Row]]:
    """Return the block and its row, by the identity of each down projection in a block of the table."""
    found = {}
    for block in model.modules():
        row = patch_of(block) or row_of(block)
        if row is not None:
            outer = block if row.outer is None else block.get_submodule(row.outer)
            found[id(outer.get_submodule(row.down))] = (block, row)
    return found


def _merged(layer: Any) -> str:
    """Return that a layer's vectors are merged, and where they went if it is quantized."""
    state = getattr(layer, "_merge_state", None)  # none where PEFT merged
    if state is None or state.placement is None:
        return "merged"
    error = error_of(state.placement)
    if error is not None:
        return f"merged into a weight quantized anew, {error:.2g} of its norm away from the exact one"
    return (
        "merged into the scales"
        if state.placement.path == state.placement.owner
        else f"merged into {state.placement.path}"
    )


def _row(path: str, layer: Any, place: tuple[nn.Module, Row] | None, compute_dtype: torch.dtype) -> ReportRow:
    kind = "input" if layer.is_feedforward else "output"
    base = layer.base_layer
    if not isinstance(layer, ScaledLayer):
        return ReportRow(
            path, kind, f"{type(layer).__module__.partition('.')[0]}", "not accelerated: ia3.accelerate does"
        )
    if layer.disable_adapters or not vectors_of(layer, acting_adapters(layer)):
        state = _merged(layer) if layer.merged else "disabled" if layer.disable_adapters else "not active here"
        return ReportRow(path, kind, type(base).__name__, f"the adapter is {state}")
    weight: Any = base.weight
    if not isinstance(weight, torch.Tensor):  # torch.ao's quantized layers have a method of that name
        weight = weight()
    device, dtype = weight.device, weight.dtype if weight.is_floating_point() else compute_dtype
    if isinstance(base, ExpertsMatrix):
        op, how = base.runs()
        choice = ia3_kernels.explain(op, device.type, dtype)
        return ReportRow(path, kind, f"{op} ({choice.backend})", f"{how}; {choice.reason}")
    reason = ""
    if layer.is_feedforward:
        if place is None:
            reason = "not fused: no row of the table describes the block around it; "
        else:
            block, row = place
            in_the_way = obstacle(block, row)
            if in_the_way is None and patch_of(block) is None:
                in_the_way = f"{row.method} of the block is another library's"
            if in_the_way is None:
                op = "gated_activation" if row.is_joined or row.gate is not None else "scaled_activation"
                choice = ia3_kernels.explain(op, device.type, dtype)
                fused = f"fused into {type(block).__name__} ({row.family}); {choice.reason}"
                return ReportRow(path, kind, f"{op} ({choice.backend})", fused)
            reason = f"not fused: {in_the_way}; "
    if isinstance(base, nn.Conv2d | nn.Conv3d):
        return ReportRow(path, kind, "torch", reason + "convolutions are scaled per channel by torch")
    if hasattr(weight, "full_tensor"):
        op, detail = "scaled_linear", "sharded, whole while its block runs; "
    elif plain_weight(base) is None:
        op, detail = "scaled_activation", f"{type(base).__name__} computes its own product; "
    else:
        op, detail = "scaled_linear", ""
    choice = ia3_kernels.explain(op, device.type, dtype)
    return ReportRow(path, kind, f"{op} ({choice.backend})", reason + detail + choice.reason)
