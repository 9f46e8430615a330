"""`ia3 tune`: measures the scaled matmuls of a model, or of given shapes, on this GPU, and keeps what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..errors import IA3Error
from . import checkpoints

# Two octaves apart: every number of rows up to four times the last has a measurement within a factor of two.
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


def run(model: Path | None, shapes: list[str], dtype: str, rows: list[int]) -> None:
    """Measure the scaled products of a model or of shapes on the current GPU; writes its file after each."""
    import torch

    from ia3_kernels import routes, target, tune
    from ia3_kernels.routes import Product

    if not torch.cuda.is_available():
        raise IA3Error("there is nothing to tune here, because there is no GPU that torch can use.")
    problems = target.triton_problem(), target.cuda_problem()
    if None not in problems:
        raise IA3Error(f"there is nothing but the library's matmul to measure here: {' '.join(map(str, problems))}")
    wanted = {(side, *_shape(text), False) for text in shapes for side in ("input", "output")}
    if model is not None:
        wanted |= _shapes_of(model)
    if not wanted:
        raise IA3Error("there are no shapes to measure: name a model's folder, or give --shape OUTxIN.")
    index = torch.cuda.current_device()
    path, facts = routes.path_of(index), routes.identity(index)
    found = dict(routes.tuned(index))
    kind: torch.dtype = getattr(torch, dtype)
    table = Table("side", "rows", "out x in", "library", "Triton", "CUDA", "route", "in a CUDA graph")
    table.title = torch.cuda.get_device_name(index)
    jobs = [
        Product(side, count, outputs, inputs, kind.itemsize, is_transposed)
        for side, outputs, inputs, is_transposed in sorted(wanted)
        for count in rows
    ]
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=len(jobs))
        for product in jobs:
            result = tune.measure_linear(index, product, kind)
            found[product] = result
            routes.write(path, facts, found)  # an interrupted run keeps what it has
            table.add_row(
                product.side,
                str(product.rows),
                f"{product.outputs} x {product.inputs}" + (" (Conv1D)" if product.is_transposed else ""),
                *(
                    "-" if time is None else f"{time * 1e6:.1f} us"
                    for time in (result.library, result.triton, result.cuda)
                ),
                *(result.fastest({"triton", "cuda"}, is_captured) for is_captured in (False, True)),
            )
            progress.advance(task)
    Console().print(table)
    print(f"Kept in {path}")


def _shape(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.lower().partition("x")
    if not (outputs.isdigit() and inputs.isdigit() and int(outputs) and int(inputs)):
        raise IA3Error(f"--shape is {text!r}; expected OUTxIN in features, such as 1024x3072.")
    return int(outputs), int(inputs)


def _shapes_of(folder: Path) -> set[tuple[str, int, int, bool]]:
    """Return the ``(side, out, in, is_transposed)`` that the default targets of the model in ``folder`` scale."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..config import IA3Config
    from ..fused import plan_adapter
    from ..layers import plain_weight

    checkpoints.locate(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    found = set()
    for entry in plan_adapter(model, IA3Config()).targets:
        weight = plain_weight(entry.module)
        if weight is not None:  # experts multiply in groups, which this does not measure
            side = "input" if entry.is_feedforward else "output"
            found.add((side, *weight.shape, weight.stride(1) != 1))
    return found
