"""Records: one flat row for each implementation and each baseline it is compared with."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from ia3.files import atomic_write_text
from ia3_kernels.target import kernel_sources as kernel_sources

from .measure import interquartile_range, paired_ratio
from .settings import commit, device_name


@dataclass(frozen=True)
class Record:
    """One row of a result file.

    `median_s` and `iqr_s` are seconds of one call; `bytes` is what the suite counts (moved, or kept for backward).
    `ratio` compares with `ratio_to`: of times or bytes where that names an implementation, so less is better; a share
    of a rate where it names a bandwidth or a rate, so more is better. What does not apply is None.
    """

    suite: str
    case: str
    dtype: str
    impl: str
    median_s: float | None
    iqr_s: float | None
    ratio_to: str | None
    ratio: float | None
    bytes: int | None
    device: str
    torch: str
    commit: str


class Recorder:
    """Collects the records of one run, all of one device, torch and commit, for the file ``path``."""

    def __init__(self, device: torch.device, path: Path | None = None) -> None:
        self.records: list[Record] = []
        self._device = device_name(device)
        self._path = path

    def save(self) -> None:
        """Writes what there is, so that a run which is stopped later loses nothing; nothing without a path."""
        if self._path is not None:
            write(self._path, self.records)

    def add(
        self,
        suite: str,
        case: str,
        dtype: str,
        impl: str,
        *,
        times: Sequence[float] | None = None,
        ratios: Mapping[str, float] | None = None,
        nbytes: int | None = None,
    ) -> None:
        """Adds a record for each baseline in `ratios`, or one without a ratio where there is none."""
        median = None if times is None else statistics.median(times)
        iqr = None if times is None else interquartile_range(times)
        compared: list[tuple[str | None, float | None]] = [*ratios.items()] if ratios else [(None, None)]
        for ratio_to, ratio in compared:
            self.records.append(
                Record(
                    suite=suite,
                    case=case,
                    dtype=dtype,
                    impl=impl,
                    median_s=median,
                    iqr_s=iqr,
                    ratio_to=ratio_to,
                    ratio=ratio,
                    bytes=nbytes,
                    device=self._device,
                    torch=str(torch.__version__),
                    commit=commit(),
                )
            )

    def add_times(
        self,
        suite: str,
        case: str,
        dtype: str,
        times: Mapping[str, Sequence[float]],
        baselines: Mapping[str, Sequence[str]],
        nbytes: Mapping[str, int] | None = None,
    ) -> None:
        """Adds every implementation of one interleaved run, with paired ratios of time to those baselines that ran."""
        for impl, values in times.items():
            ratios = {base: paired_ratio(values, times[base]) for base in baselines.get(impl, ()) if base in times}
            self.add(suite, case, dtype, impl, times=values, ratios=ratios, nbytes=(nbytes or {}).get(impl))


def write(path: Path, records: Sequence[Record]) -> None:
    """Writes `records` as a JSON list, beside `path` first and renamed when whole."""
    atomic_write_text(path, json.dumps([asdict(record) for record in records], indent=1) + "\n")


def read(path: Path) -> list[Record]:
    """Reads a result file; raises ValueError with a sentence if it is not one."""
    names = {field.name for field in fields(Record)}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a file that `python -m bench --json` wrote") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() == names for row in rows):
        raise ValueError(f"{path} is not a list of benchmark records; give a file that `python -m bench --json` wrote")
    return [Record(**row) for row in rows]
