"""What options of several commands have in common: their types and checks. Parsing imports no torch."""

from __future__ import annotations

import math
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


def between(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Callable[[float], float]:
    """Return a check that a number lies between `low` and `high`, themselves left out where they are open."""

    def check(value: float) -> float:
        too_low = value <= low if open_low else value < low
        too_high = value >= high if open_high else value > high
        if too_low or too_high or math.isnan(value):
            bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
            raise typer.BadParameter(f"{value:g} is not in {bounds}")
        return value

    return check


positive = between(0, math.inf, open_low=True, open_high=True)
not_negative = between(0, math.inf, open_high=True)

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
Seed = Annotated[int, typer.Option(callback=between(0, 2**32 - 1), help="The same seed gives the same result.")]
