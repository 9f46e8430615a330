"""`ia3 doctor`: what is installed, what was built, and which backend runs what, and why."""

from __future__ import annotations

import platform

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import checkpoints, options

PACKAGES = ("transformers", "peft", "accelerate", "gguf", "matplotlib")
OPERATORS = ("scaled_linear", "gated_activation", "scaled_activation", "scale_weight_")


def run() -> None:
    """Show what is installed, what was built, and which backend runs what, and why."""
    import torch

    from ia3_kernels import backends, explain, routes, target

    console = Console()
    installation = Table(title="Installation", title_justify="left", show_header=False)
    installation.add_row("system", platform.platform())
    for label, fact in target.describe().items():
        installation.add_row(label, escape(fact))
    try:
        fastest = str(checkpoints.pick_dtype(options.AUTO, checkpoints.pick_device(options.AUTO)))
    except (RuntimeError, ValueError) as error:  # a word in the environment that means nothing
        fastest = f"not measured: {error}"
    installation.add_row("fastest dtype", escape(fastest.removeprefix("torch.")))
    for package in PACKAGES:
        installation.add_row(package, target.version(package) or "not installed")
    console.print(installation)

    built = Table("backend", "available", "why", title="Backends", title_justify="left")
    for status in backends.report():
        built.add_row(status.name, "yes" if status.available else "no", escape(status.reason))
    console.print(built)

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    chosen = Table("operator", "device", *names, title="Chosen", title_justify="left")
    reasons: dict[str, int] = {}  # many choices share one reason, so the table holds its number
    for operator in OPERATORS:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            cells = []
            for dtype in dtypes:
                try:
                    choice = explain(operator, device=device, dtype=dtype)
                    backend, reason = choice.backend, choice.reason
                except (RuntimeError, ValueError) as error:  # a backend asked for by name that cannot do it
                    backend, reason = "none", str(error)
                cells.append(f"{backend} ({reasons.setdefault(reason, len(reasons) + 1)})")
            chosen.add_row(operator, device, *cells)
    console.print(chosen)
    for reason, number in reasons.items():
        console.print(f"({number}) {reason}", markup=False, highlight=False)
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    for path, words in routes.report(gpu).items():
        console.print(f"ia3 tune's {path}: {words}.", markup=False, highlight=False, soft_wrap=True)
