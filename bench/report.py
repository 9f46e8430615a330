"""Shows a result file: a table in the terminal, or `python -m bench.report RESULT.json` as Markdown for the docs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from rich.table import Table

from .records import Record, read

_COLUMNS = ("case", "dtype", "implementation", "median", "IQR", "bytes", "GB/s", "compared")
_Rows = list[tuple[str, ...]]


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value * 1e9:.3g} ns"


def _bytes(value: int | None) -> str:
    if value is None:
        return ""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value} B"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def _compared(record: Record) -> str:
    if record.ratio is None or record.ratio_to is None:
        return ""
    if record.ratio_to.endswith(("bandwidth", "rate")):
        return f"{record.ratio:.0%} of {record.ratio_to}"
    if record.ratio_to == "launches":
        return f"{record.ratio:.0f} launches"
    return f"{_ratio(record.ratio)}x {record.ratio_to}"


def _row(group: Sequence[Record]) -> tuple[str, ...]:
    """One row for the records of one implementation, which differ only in what they are compared with."""
    record = group[0]
    rate = f"{record.bytes / record.median_s / 1e9:.1f}" if record.bytes and record.median_s else ""
    return (
        record.case,
        record.dtype,
        record.impl,
        _seconds(record.median_s),
        _seconds(record.iqr_s),
        _bytes(record.bytes),
        rate,
        "; ".join(filter(None, map(_compared, group))),
    )


def _measured(records: Iterable[Record]) -> _Rows:
    """Column names, then a row for each implementation; without columns that are empty throughout."""
    rows = [_row(list(group)) for _, group in groupby(records, lambda r: (r.case, r.dtype, r.impl))]
    used = [index for index in range(len(_COLUMNS)) if any(row[index] for row in rows)]
    return [tuple(row[index] for index in used) for row in (_COLUMNS, *rows)]


def _errors(records: Sequence[Record]) -> _Rows:
    """Column names, then a row for each case with the ratio of errors in each dtype."""
    dtypes = list(dict.fromkeys(record.dtype for record in records))
    ratios = {(record.case, record.dtype): _ratio(record.ratio or 0.0) for record in records}
    cases = dict.fromkeys(record.case for record in records)
    return [
        ("error, ours / eager", *dtypes),
        *((case, *(ratios.get((case, dtype), "") for dtype in dtypes)) for case in cases),
    ]


def _by_suite(records: Iterable[Record]) -> dict[str, _Rows]:
    groups = {suite: list(group) for suite, group in groupby(records, lambda r: r.suite)}
    return {suite: (_errors if suite == "accuracy" else _measured)(group) for suite, group in groups.items()}


def tables(records: Iterable[Record]) -> list[Table]:
    """A table for the terminal for each suite."""
    made = []
    for suite, (names, *rows) in _by_suite(records).items():
        table = Table(*names, title=suite, title_justify="left")
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def markdown(records: Sequence[Record], path: Path) -> str:
    """A Markdown table for each suite of the result file `path`, under where it was measured and by which command."""
    suites = _by_suite(records)
    dtypes = dict.fromkeys(record.dtype for record in records if record.suite != "accuracy" and record.dtype != "any")
    options = f" --dtype {' '.join(dtypes)}" if dtypes else ""
    parts = [f"```sh\npython -m bench {' '.join(suites)} --json {path.name}{options}\n```"]
    for commit, device, torch in dict.fromkeys((record.commit, record.device, record.torch) for record in records):
        parts.append(f"Commit {commit}, torch {torch}, {device}.")
    for suite, (names, *rows) in suites.items():
        lines = [_line(names), _line(["---"] * len(names)), *map(_line, rows)]
        parts.append(f"### {suite}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a result file as Markdown; exit code 2 and a sentence if it cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("result", type=Path, help="a file that `python -m bench --json` wrote")
    path: Path = parser.parse_args(argv).result
    try:
        records = read(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write(markdown(records, path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
