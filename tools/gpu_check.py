"""``make gpu-check``: build for the GPU that is here, prove the kernels on it, and measure them, in 13 minutes.

Needs no network and no installation: it uses the Python that runs it, and builds the native library in place; with a
folder that ``make gpu-bundle`` made (``build/gpu-bundle``, or ``IA3_CUDA_BUNDLE``) it compiles no CUDA kernels. Its
parts, in this order, each of which can be asked for alone (``--part host``):

    probe      whether cuBLAS multiplies a matmul's outputs by a vector itself, and how fast
    tests      operators and models on CUDA tensors; with several workers, where pytest-xdist is installed
    host       what an eager call costs on the host
    protocol   a whole model: training steps, decoding
    merge      merging, unmerging and swapping: of one weight the share of the copy bandwidth, of a whole model the time
    operators  the operators against the formula, F.linear, and the memory's bandwidth
    sanitize   compute-sanitizer's memcheck, racecheck and initcheck over a small subset; only if it is asked for

A part that takes longer than it may is stopped, and what it has measured so far is kept. Each ends with a short table,
and the whole with all of them. The folder ``--output`` then holds at most eight files: everything that was printed
(log.txt), the records of each suite, the environment and the summary. With no GPU it says so and stops;
``--dry-run`` goes through the parts on the CPU with tiny sizes, and proves nothing but itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.records import Record

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "build" / "gpu-bundle"
# Seconds that each part may take: with a build of a minute, 13 minutes for all that run by default.
SECONDS = {"probe": 40, "tests": 300, "host": 60, "protocol": 180, "merge": 50, "operators": 110, "sanitize": 300}
DEFAULT = [part for part in SECONDS if part != "sanitize"]
_BUILD_SECONDS = 300
# What takes the time is compiling Triton kernels, which needs cores; the GPU's part is small.
WORKERS = min(16, os.cpu_count() or 1)
# What has a place or a backend on a GPU; what proves GPU kernels without one has proved it elsewhere.
TESTS = [
    f"tests/ia3_kernels/test_{name}.py" for name in ("cuda", "exact_gpu", "operators", "gradients", "mlp", "contract")
]
TESTS += ["tests/ia3/test_on_device.py", "-k", "(cuda or on_device) and not emulated and not reference"]
DRY_TESTS = ["tests/ia3_kernels/test_cuda.py", "tests/ia3/test_on_device.py", "-k", "captured or llama"]
# Small shapes, each kernel once: a sanitizer slows them down a hundredfold.
SANITIZED = ["tests/ia3_kernels/test_cuda.py", "-k", "captured or stream", "-p", "no:cacheprovider"]


@dataclass
class Run:
    """One run: where its files go, whether it is a dry one, and the summary so far."""

    output: Path
    is_dry: bool
    summary: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log = open(self.output / "log.txt", "w", encoding="utf-8")  # noqa: SIM115  (as long as the process)

    def say(self, lines: Iterable[str]) -> None:
        """Show lines, and keep them in the log."""
        for line in lines:
            print(line, flush=True)
            print(line, file=self.log, flush=True)

    def command(self, arguments: Sequence[str | Path], seconds: float, **variables: str) -> tuple[str, list[str]]:
        """Run a command, its output to the terminal and the log, for at most ``seconds``.

        Returns what went wrong, empty if nothing did, and the lines that it printed.
        """
        self.say([f"$ {' '.join(map(str, arguments))}"])
        process = subprocess.Popen(
            [*map(str, arguments)],
            cwd=ROOT,
            env=self._environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that its workers stop with it
        )
        is_late = threading.Event()

        def stop() -> None:
            is_late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        lines = []
        for line in process.stdout or ():
            lines.append(line.rstrip())
            self.say(lines[-1:])
        status = process.wait()
        timer.cancel()
        if is_late.is_set():
            return f"stopped after {seconds:.0f} s", lines
        return f"exit status {status}" if status else "", lines

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "IA3_TEST_DEVICE": "cpu" if self.is_dry else "cuda",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "160",  # of tables, which are cut to 80 where there is no terminal
            **({"CUDA_VISIBLE_DEVICES": ""} if self.is_dry else {}),
        }


def build(run: Run) -> bool:
    """The native library, in place and for this GPU alone; the Triton kernels compile when they are first used."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("IA3_CUDA_ARCHITECTURES", str(10 * major + minor))
    bundle = Path(os.environ.pop("IA3_CUDA_BUNDLE", BUNDLE)).resolve()
    if bundle.is_dir():
        made_for = (bundle / "architecture.txt").read_text("utf-8").strip()
        if made_for == os.environ["IA3_CUDA_ARCHITECTURES"]:
            os.environ["IA3_CUDA_BUNDLE"] = str(bundle)
        else:
            run.say([f"gpu-check: {bundle} is for capability {made_for}; compiling for this GPU's here."])
    problem, _ = run.command([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], _BUILD_SECONDS)
    if problem and os.environ.pop("IA3_CUDA_BUNDLE", None):
        run.say([f"gpu-check: {bundle} could not be used, as is said above; compiling its kernels here."])
        problem, _ = run.command([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], _BUILD_SECONDS)
    return not problem


# --- the parts: each returns what went wrong, empty if nothing did, and its table ---------------------------------

_Outcome = tuple[str, list[str]]


def probe(run: Run, seconds: float) -> _Outcome:
    """What cuBLASLt offers; see tools/probe_cublaslt.py, whose last lines are the table."""
    options = ["--dry-run"] if run.is_dry else []
    command = [sys.executable, ROOT / "tools" / "probe_cublaslt.py", "--json", run.output / "probe.json", *options]
    problem, lines = run.command(command, seconds)
    starts = [number for number, line in enumerate(lines) if line.startswith(("cuBLASLt ", "probe_cublaslt: "))]
    return problem, lines[starts[-1] :] if starts else []


def tests(run: Run, seconds: float) -> _Outcome:
    """The tests that have something to say about a GPU."""
    workers = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") and not run.is_dry else []
    chosen = DRY_TESTS if run.is_dry else TESTS
    # Every test's name as it ends: what is stopped has said which failed.
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "--maxfail=30", *workers, *chosen]
    problem, lines = run.command(command, seconds)
    # With workers the verdict comes first, without the name does.
    verdict = re.compile(r"(?:FAILED|ERROR) (tests/.+?)(?: - .*)?\s*$|^(tests/.+?) (?:FAILED|ERROR)\b")
    failed = dict.fromkeys(f"FAILED {match[1] or match[2]}"[:158] for match in map(verdict.search, lines) if match)
    return problem, [*failed, *lines[-1:]]


def sanitize(run: Run, seconds: float) -> _Outcome:
    """compute-sanitizer's verdicts."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "", ["skipped: compute-sanitizer is not installed"]
    problems, table = [], []
    for check in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", check, "--error-exitcode", "1", sys.executable, "-m", "pytest", "-q", *SANITIZED]
        # The caching allocator hides overruns inside of its blocks.
        problem, _ = run.command(command, seconds / 3, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        problems += [f"{check}: {problem}"] if problem else []
        table.append(f"{check}: {problem or 'no errors'}")
    return "; ".join(problems), table


def _suite(name: str, table: Callable[[list[Record]], list[str]]) -> Callable[[Run, float], _Outcome]:
    """A suite of ``python -m bench``, whose records are shown as ``table`` makes of them."""

    def part(run: Run, seconds: float) -> _Outcome:
        from bench.records import read

        path = run.output / f"{name}.json"
        path.unlink(missing_ok=True)
        options = ["--device", "cuda"] if not run.is_dry else ["--device", "cpu", "--quick"]
        if run.is_dry:  # compiling takes long, and is tried elsewhere
            options += ["--impl", "ours", "accelerated", "peft", "frozen_base"]
        command = [sys.executable, "-m", "bench", name, "--dtype", "bf16", "--json", path, *options]
        problem, _ = run.command(command, seconds)
        return problem, table(read(path)) if path.exists() else []

    return part


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ratio(records: Iterable[Record], case: str, impl: str, to: str) -> float | None:
    return next((r.ratio for r in records if (r.case, r.impl, r.ratio_to) == (case, impl, to)), None)


def _shown(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def host_table(records: list[Record]) -> list[str]:
    """A row for each call: µs, and its time over the formula's, or over PEFT's layer's."""
    rows = [["a call", "µs", "/ formula", "/ PEFT"]]
    for record in {record.case: record for record in records if record.impl == "ours"}.values():
        ratios = [_shown(_ratio(records, record.case, "ours", to)) for to in ("eager", "peft")]
        rows.append([record.case, f"{1e6 * (record.median_s or 0):.1f}", *ratios])
    return _aligned(rows)


def protocol_table(records: list[Record]) -> list[str]:
    """A row for each case and implementation: ms, over the frozen base and PEFT; kernels' ms, launches, peak memory."""
    rows = [["", "ms", "/ base", "/ PEFT", "GPU ms", "launches", "peak GB"]]
    timed = {(r.case, r.impl): r for r in records}
    for (case, impl), record in timed.items():
        if case.endswith((", kernels", ", peak memory beside the weights")):
            continue
        base = next((r for to in ("frozen_base", "base", "copy") if (r := _ratio(records, case, impl, to))), None)
        of_peft = next(
            (r for to in ("peft", "peft merge", "peft unmerge") if (r := _ratio(records, case, impl, to))), None
        )
        kernels, peak = (
            timed.get((f"{case}, kernels", impl)),
            timed.get((f"{case}, peak memory beside the weights", impl)),
        )
        rows.append(
            [
                f"{case}: {impl}",
                f"{1e3 * (record.median_s or 0):.2f}",
                _shown(base),
                _shown(of_peft),
                _shown(kernels and 1e3 * (kernels.median_s or 0), ".2f"),
                _shown(kernels and _ratio(records, kernels.case, impl, "launches"), ".0f"),
                _shown(peak and (peak.bytes or 0) / 1e9, ".1f"),
            ]
        )
    return _aligned(rows)


def merge_table(records: list[Record]) -> list[str]:
    """A row for each weight and step: ms, share of the copy bandwidth; for a model: ms, over a copy and over PEFT."""
    rows = [["", "ms", "of copy", "/ copy", "/ PEFT"]]
    for record in {(r.case, r.impl): r for r in records if r.median_s is not None}.values():
        over = {
            ratio.ratio_to: ratio.ratio for ratio in records if (ratio.case, ratio.impl) == (record.case, record.impl)
        }
        of_peft = next((ratio for to, ratio in over.items() if to and to.startswith("peft")), None)
        shown = [_shown(over.get("copy bandwidth"), ".1%"), _shown(over.get("copy")), _shown(of_peft)]
        rows.append([f"{record.case}: {record.impl}", f"{1e3 * (record.median_s or 0):.3f}", *shown])
    return _aligned(rows)


def operators_table(records: list[Record]) -> list[str]:
    """Shares of the copy bandwidth, and the output-side matmul over F.linear: geometric mean and worst."""
    rows = []
    matmuls: dict[str, dict[str, float]] = {}
    for record in records:
        if record.ratio is None or not record.impl.startswith(("ours", "cuda", "triton")):
            continue
        if "scaled_linear output side" in record.case and record.ratio_to == "linear":
            matmuls.setdefault(record.impl, {})[record.case] = record.ratio
        elif record.ratio_to == "copy bandwidth" and "scaled_linear" not in record.case:
            rows.append([f"{record.case}: {record.impl}", f"{record.ratio:.1%} of copy"])
    for impl, ratios in matmuls.items():
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        worst = max(ratios, key=lambda case: ratios[case])
        rows.append([f"output-side matmul / F.linear: {impl}", f"{mean:.3f}; {ratios[worst]:.3f} ({worst})"])
    return _aligned(rows)


PARTS: dict[str, Callable[[Run, float], _Outcome]] = {
    "probe": probe,
    "tests": tests,
    "host": _suite("host", host_table),
    "protocol": _suite("protocol", protocol_table),
    "merge": _suite("merge", merge_table),
    "operators": _suite("operators", operators_table),
    "sanitize": sanitize,
}


def environment() -> dict[str, str]:
    """What measurements are of: device, versions, sources, date."""
    import torch

    from bench.records import kernel_sources
    from bench.settings import commit
    from ia3_kernels import target

    is_there = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if is_there else "cpu",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": target.version("triton"),
        "transformers": target.version("transformers"),
        "peft": target.version("peft"),
        "commit": commit(),
        "kernel sources": kernel_sources(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for; 0 if all succeeded, 1 if one did not, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=DEFAULT, help="default: all but sanitize")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: tries this program itself")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check", help="folder for logs and results")
    arguments = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        print("gpu-check: torch is not installed for this Python; run it with one that has torch for this GPU.")
        return 2
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU here, so there is nothing to check; run it on a machine that has one.")
        return 2
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    started = time.monotonic()
    run = Run(output, arguments.dry_run)
    if not run.is_dry and not build(run):
        run.say([f"gpu-check: the native library could not be built; {output / 'log.txt'} says why."])
        return 1
    built = time.monotonic() - started
    facts = environment()
    (output / "environment.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    run.summary += [f"{key}: {value}" for key, value in facts.items()] + [f"build: {built:.0f} s"]
    for name in arguments.part:
        began = time.monotonic()
        problem, table = PARTS[name](run, SECONDS[name])
        took = time.monotonic() - began
        run.failed += [name] if problem else []
        verdict = f"FAILED, {problem}" if problem else "done"
        section = ["", f"== {name}: {verdict}, {took:.0f} s", *table]
        run.say(section)
        run.summary += section
    run.summary += ["", f"{(time.monotonic() - started) / 60:.1f} minutes; failed: {', '.join(run.failed) or 'none'}"]
    (output / "summary.txt").write_text("\n".join(run.summary) + "\n", "utf-8")
    run.say(["", "=" * 100, *run.summary])
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
