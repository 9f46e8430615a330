"""`ia3 tune`: measures the scaled matmuls of a model, or of given shapes, on this GPU, and keeps what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..errors import IA3Error

ROWS = (1, 4, 16, 64, 512, 4096, 16384)


def run(model: Path | None, shapes: list[str], dtype: str, rows: list[int]) -> None:
    """Measures every (rows, out_features, in_features) on the current GPU; writes its file after each."""
    import torch

    from ia3_kernels import measured, target, tuner

    problem = target.triton_problem()
    if problem is not None or not torch.cuda.is_available():
        raise IA3Error(
            f"there is nothing to tune here, because {problem or 'tuning measures a GPU, and there is none.'}"
        )
    wanted = {(*_shape(text), False) for text in shapes}
    if model is not None:
        wanted |= _shapes_of(model)
    if not wanted:
        raise IA3Error("there are no shapes to measure: name a model's folder, or give --shape OUTxIN.")
    index = torch.cuda.current_device()
    path = measured.path_of(index)
    found = dict(measured.read(path))
    kind: torch.dtype = getattr(torch, dtype)
    jobs = [(count, *shape) for shape in sorted(wanted) for count in rows]
    table = Table("rows", "out x in", "library", "Triton", "CUDA", "route", title=torch.cuda.get_device_name(index))
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=len(jobs))
        for count, outputs, inputs, is_transposed in jobs:
            result = tuner.measure_linear(index, count, outputs, inputs, kind, is_transposed)
            found[measured.linear_key(count, outputs, inputs, kind, is_transposed)] = result
            measured.write(path, found)  # an interrupted run keeps what it has
            table.add_row(
                str(count),
                f"{outputs} x {inputs}" + (" (Conv1D)" if is_transposed else ""),
                f"{result.library * 1e6:.1f} us",
                f"{result.triton * 1e6:.1f} us",
                "-" if result.cuda is None else f"{result.cuda * 1e6:.1f} us",
                result.route,
            )
            progress.advance(task)
    Console().print(table)
    print(f"Kept in {path}")


def _shape(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.lower().partition("x")
    if not (outputs.isdigit() and inputs.isdigit() and int(outputs) and int(inputs)):
        raise IA3Error(f"--shape is {text!r}; expected OUTxIN in features, such as 1024x3072.")
    return int(outputs), int(inputs)


def _shapes_of(folder: Path) -> set[tuple[int, int, bool]]:
    """The weights ``(out, in, is_transposed)`` that the default targets of the model in ``folder`` scale."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..config import IA3Config
    from ..layers import is_linear, plain_weight
    from ..matching import plan_adapter

    if not (folder / "config.json").is_file():
        raise IA3Error(f"there is no config.json in {folder}; name the folder of a transformers model.")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    found = set()
    for entry in plan_adapter(model, IA3Config()).targets:
        weight = plain_weight(entry.module) if is_linear(entry.module) else None
        if weight is not None:
            found.add((*weight.shape, weight.stride(1) != 1))
    return found
