"""``make gpu-check``: builds for the GPU that is here, proves the kernels on it, and measures them.

Needs no network and no installation: it uses the Python that runs it, builds the native library in place, and runs
three parts, each of which can be asked for alone:

    tests      the whole suite, operators on CUDA tensors
    sanitize   compute-sanitizer's memcheck, racecheck and initcheck over a small subset, where it is installed
    bench      the suites host, protocol, operators, train_step, decode and memory, into bench/results/<device>.json

The Hopper matmul needs CUTLASS' headers: the package nvidia-cutlass, or CUTLASS_PATH with the folder that holds
include/cutlass. Without them it is left out, and the build says so.

The last thing that it prints is a short table. With no GPU it says so and stops.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "sanitize", "bench")
# Small shapes, each kernel once: a sanitizer slows them down a hundredfold.
SANITIZED = ["tests/ia3_kernels/test_cuda.py", "-k", "captured or stream", "-p", "no:cacheprovider"]
# The operators with all backends; the rest of the suite knows nothing of devices, and runs only in full.
QUICK_TESTS = [
    "tests/ia3_kernels/test_cuda.py",
    "tests/ia3_kernels/test_operators.py",
    "-k",
    "(triton or cuda or graph) and not emulated",
]
# What proves the GPU's kernels without a GPU has its place elsewhere, and takes minutes of this one's.
_ELSEWHERE = ("compiled", "cuda_emulated", "cuda_hopper", "variants")
FULL_TESTS = ["tests/ia3_kernels", "tests/ia3", "-m", "not slow", "-k", "not emulated"]
FULL_TESTS += [f"--ignore=tests/ia3_kernels/test_{name}.py" for name in _ELSEWHERE]


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "IA3_TEST_DEVICE": "cuda", "PYTHONUNBUFFERED": "1"}


def _run(command: Sequence[str | Path], log: Path) -> bool:
    """Run a command, its output to the terminal and the log; whether it succeeded."""
    print(f"$ {' '.join(map(str, command))}", flush=True)
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout or ():
            file.write(line)
            print(line, end="", flush=True)
    return process.wait() == 0


def build(output: Path) -> bool:
    """The native library, in place and for this GPU alone; the Triton kernels compile when they are first used."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("IA3_CUDA_ARCHITECTURES", str(10 * major + minor))
    return _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], output / "build.log")


def tests(output: Path, quick: bool) -> dict[str, str]:
    """The suite on CUDA tensors."""
    chosen = QUICK_TESTS if quick else FULL_TESTS
    passed = _run([sys.executable, "-m", "pytest", "-q", "--maxfail", "20", *chosen], output / "tests.log")
    return {"tests": _last_line(output / "tests.log") if passed else f"FAILED: {_last_line(output / 'tests.log')}"}


def sanitize(output: Path, quick: bool) -> dict[str, str]:
    """compute-sanitizer's verdicts."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"sanitize": "skipped: compute-sanitizer is not installed"}
    verdicts = {}
    for check in ("memcheck",) if quick else ("memcheck", "racecheck", "initcheck"):
        log = output / f"{check}.log"
        command = [tool, "--tool", check, "--error-exitcode", "1", sys.executable, "-m", "pytest", "-q", *SANITIZED]
        # The caching allocator hides overruns inside of its blocks.
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        passed = _run(command, log)
        del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
        verdicts[check] = "no errors" if passed else f"FAILED: see {log}"
    return verdicts


def bench(output: Path, quick: bool) -> dict[str, str]:
    """The measurements: ``bench/results/<device>.json`` and a Markdown file beside the logs."""
    import torch

    from bench.records import kernel_sources
    from ia3_kernels import target

    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    raw = output / "records.json"
    suites = ["host", "protocol", "operators", "train_step", "decode", "memory"]
    options = ["--device", "cuda", "--dtype", "bf16", "--json", raw]
    if quick:
        suites, options = ["host", "protocol"], [*options, "--impl", "ours", "peft", "frozen_base"]
    if not _run([sys.executable, "-m", "bench", *suites, *options], output / "bench.log"):
        return {"bench": f"FAILED: see {output / 'bench.log'}"}
    environment = {
        "device": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": target.version("triton"),
        "transformers": target.version("transformers"),
        "peft": target.version("peft"),
        "kernel sources": kernel_sources(),
        "date": time.strftime("%Y-%m-%d"),
    }
    results = ROOT / "bench" / "results"
    shutil.copyfile(raw, results / f"{name}.json")
    (results / f"{name}.environment.json").write_text(json.dumps(environment, indent=1) + "\n", "utf-8")
    for path in (results / f"{name}.json", results / f"{name}.environment.json"):
        shutil.copyfile(path, output / path.name)
    _run([sys.executable, "-m", "bench.report", raw], output / "bench.md")
    return _headlines(raw)


def _headlines(path: Path) -> dict[str, str]:
    """The ratios that the project is held to, out of the records."""
    from bench.records import read

    records = [record for record in read(path) if record.ratio is not None]
    found: dict[str, str] = {}
    matmuls: dict[str, list[float]] = {}
    for record in records:
        if record.suite == "host" and record.impl == "ours" and record.ratio_to == "eager":
            found[f"host, {record.case}: ours / eager"] = f"{record.ratio:.3f}"
        elif record.suite == "protocol":
            found[f"{record.case}: {record.impl} / {record.ratio_to}"] = f"{record.ratio:.3f}"
        elif record.suite == "train_step":
            found[f"train step: {record.impl} / {record.ratio_to}"] = f"{record.ratio:.3f}"
        elif record.suite == "memory" and "peak" in record.case and record.impl == "ours":
            found[f"peak memory: ours / {record.ratio_to}"] = f"{record.ratio:.3f}"
        elif "scaled_linear output side" in record.case and record.ratio_to == "linear":
            matmuls.setdefault(record.impl, []).append(record.ratio or 0.0)
        elif record.ratio_to == "copy bandwidth" and record.impl == "ours":
            found[f"{record.case}: share of copy bandwidth"] = f"{record.ratio:.0%}"
    for implementation, ratios in matmuls.items():
        product = 1.0
        for ratio in ratios:
            product *= ratio
        mean = product ** (1 / len(ratios))
        found[f"output-side matmul: {implementation} / F.linear, mean; worst"] = f"{mean:.3f}; {max(ratios):.3f}"
    return found


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def main() -> int:
    """Run the parts that were asked for; 0 if all succeeded, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="a subset, in less than four minutes")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check", help="folder for logs and results")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("gpu-check: torch is not installed for this Python; run it with one that has torch for this GPU.")
        return 2
    if not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU here, so there is nothing to check; run it on a machine that has one.")
        return 2
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    started = time.monotonic()
    summary = {"device": torch.cuda.get_device_name(), "torch": str(torch.__version__)}
    if not build(output):
        print(f"gpu-check: the native library could not be built; see {output / 'build.log'}.")
        return 1
    for part in arguments.part:
        summary.update({"tests": tests, "sanitize": sanitize, "bench": bench}[part](output, arguments.quick))
    summary["minutes"] = f"{(time.monotonic() - started) / 60:.1f}"
    width = max(map(len, summary))
    lines = [f"{key.ljust(width)}  {value}" for key, value in summary.items()]
    (output / "summary.txt").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n" + "\n".join(lines))
    return 1 if any(value.startswith("FAILED") for value in summary.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
