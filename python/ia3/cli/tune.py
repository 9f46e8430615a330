"""`ia3 tune`: measures the scaled matmuls of a model, or of given shapes, on this GPU, and keeps what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from ..errors import IA3Error
from . import checkpoints
from .options import DTYPES, one_of

# Two octaves apart: every number of rows up to four times the last has a measurement within a factor of two.
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


def run(
    model: Path | None = Argument(None, metavar="MODEL", help="Folder of a model, whose scaled layers are measured."),
    shape: list[str] | None = Option(None, metavar="OUTxIN", help="A weight to measure; may be given several times."),
    dtype: str = Option("bfloat16", callback=one_of(DTYPES), help=f"One of {', '.join(DTYPES)}."),
    rows: list[int] | None = Option(None, help="Tokens in a batch; may be given several times. Default: 1 to 16384."),
) -> None:
    """Measure the matmuls of a model on this GPU, so that scaled_linear takes the fastest."""
    import torch
    from rich.progress import track

    from ia3_kernels import routes, target, tune
    from ia3_kernels.routes import Product

    if any(count < 1 for count in rows or ()):
        raise IA3Error("--rows is below 1; give numbers of tokens.")
    if not torch.cuda.is_available():
        raise IA3Error("there is nothing to tune here, because there is no GPU that torch can use.")
    problems = target.triton_problem(), target.cuda_problem()
    if None not in problems:
        raise IA3Error(f"there is nothing but the library's matmul to measure here: {' '.join(map(str, problems))}")
    wanted = {(side, *_shape(text), False) for text in shape or () for side in ("input", "output")}
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
        for count in rows or ROWS
    ]
    for product in track(jobs, "measuring", transient=True):
        result = found[product] = tune.measure_linear(index, product, kind)
        routes.write(path, facts, found)  # an interrupted run keeps what it has
        times = (result.library, result.triton, result.cuda)
        table.add_row(
            product.side,
            str(product.rows),
            f"{product.outputs} x {product.inputs}" + (" (Conv1D)" if product.is_transposed else ""),
            *("-" if time is None else f"{time * 1e6:.1f} us" for time in times),
            *(result.fastest({"triton", "cuda"}, is_captured) for is_captured in (False, True)),
        )
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
    from ..layers import plain_weight
    from ..planning import plan_adapter

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
