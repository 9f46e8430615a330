"""What options of several commands have in common: their types and checks. Parsing imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
AUTO = "auto"


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return a check that a value is one of `choices`."""

    def check(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return check


def at_least(minimum: int) -> Callable[[int | None], int | None]:
    """Return a check that a number, where one is given, is not below `minimum`."""

    def check(value: int | None) -> int | None:
        if value is not None and value < minimum:
            raise typer.BadParameter(f"{value} is below {minimum}")
        return value

    return check


def within(interval: str) -> Callable[[float], float]:
    """Return a check that a number lies in an interval such as `[0, 1)`."""
    low, high = map(float, interval[1:-1].split(","))

    def check(value: float) -> float:
        is_end = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
        if not (low < value < high or is_end):
            raise typer.BadParameter(f"{value:g} is not in {interval}")
        return value

    return check


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model folder in transformers' format, or a .gguf file.")
]
Device = Annotated[
    str, typer.Option(metavar="NAME", callback=one_of(DEVICES), help="auto (CUDA if it is there), cpu or cuda.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="TYPE",
        callback=one_of((AUTO, *DTYPES)),
        help=f"Type of the frozen weights: {', '.join(DTYPES)}, or auto: the fastest here.",
    ),
]
FourBit = Annotated[
    bool, typer.Option("--load-in-4bit", help="Keep the frozen linear layers in 4 bits (NF4 of bitsandbytes).")
]
Seed = Annotated[int, typer.Option(callback=within("[0, 4294967295]"), help="The same seed gives the same result.")]
