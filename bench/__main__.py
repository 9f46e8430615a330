"""`python -m bench SUITE [SUITE...] --json PATH`: measures, writes the records and prints a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import report
from .records import Recorder
from .settings import DTYPES, GPU_IMPLEMENTATIONS, IMPLEMENTATIONS, Settings
from .suites import SUITES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures ia3-kernels against PEFT.")
    parser.add_argument(
        "suites", nargs="+", metavar="SUITE", choices=[*SUITES, "all"], help=", ".join([*SUITES, "all"])
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the records there, as a JSON list")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the harness; the times mean nothing")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument(
        "--impl", nargs="+", choices=GPU_IMPLEMENTATIONS, help="of the suites that run a model; default: all that apply"
    )
    parser.add_argument("--busy", action="store_true", help="decode: beside a process that keeps one core to itself")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suites in turn; the file is rewritten after each, so a later failure loses nothing."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was asked for, but torch finds no CUDA device here; leave it out to use the CPU")
    if arguments.json is not None and arguments.json.is_dir():
        parser.error(f"--json {arguments.json} is a folder; expected the name of a file to write")
    implementations = arguments.impl or (GPU_IMPLEMENTATIONS if arguments.device == "cuda" else IMPLEMENTATIONS)
    settings = Settings(
        tuple(dict.fromkeys(arguments.dtype)),
        arguments.quick,
        tuple(implementations),
        torch.device(arguments.device),
        arguments.busy,
    )
    recorder = Recorder(settings.device, arguments.json)
    console = Console()
    for name in SUITES if "all" in arguments.suites else dict.fromkeys(arguments.suites):
        start = len(recorder.records)
        SUITES[name](settings, recorder)
        recorder.save()
        for table in report.tables(recorder.records[start:]):
            console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
