"""``make gpu-bundle``: compile the CUDA kernels for a GPU that is elsewhere, so that its ``make gpu-check`` need not.

    python -m tools.gpu_bundle [--arch sm_90a] [--output build/gpu-bundle] [--build build/gpu-bundle-objects]

Needs nvcc, and no GPU. A GPU that is rented by the minute then only compiles the Python module, against the torch and
the Python that it has, which is why that is not in here. The folder holds ``libia3_cuda.so``, ``architecture.txt``, and
``cuda_sources.txt``, by which ``CMakeLists.txt`` refuses a library that other sources gave. ``make gpu-check`` finds
the folder where this puts it by default; ``IA3_CUDA_BUNDLE`` names another.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu-bundle"
OLDEST = 80


def capability(name: str) -> int:
    """Return 90 for ``sm_90a``, ``90a`` or ``90``.

    Raises ValueError for what names no architecture, or one older than the kernels.
    """
    found = re.fullmatch(r"(?:sm_)?(\d{2,3})a?", name)
    if found is None or int(found[1]) < OLDEST:
        raise ValueError(f"{name!r} is not an architecture from sm_{OLDEST} on; expected one such as sm_90a")
    return int(found[1])


def build(architecture: int, folder: Path) -> list[str]:
    """Compile the library in ``folder``, and return what CMake said about it.

    Raises SystemExit with a sentence if that fails.
    """
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DIA3_CUDA=ON", f"-DIA3_CUDA_ARCHITECTURES={architecture}"]
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options]
    configured = subprocess.run(configure, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if configured.returncode:
        raise SystemExit(f"{configured.stdout}gpu-bundle: CMake could not configure {folder}; it says why above.")
    compiled = subprocess.run(
        ["cmake", "--build", folder, "--target", "ia3_cuda"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if compiled.returncode:
        # ptxas has much to say of each kernel that did compile.
        lines = [line for line in compiled.stdout.splitlines() if not re.match(r"ptxas info|    \d+ bytes stack", line)]
        raise SystemExit("\n".join([*lines, "gpu-bundle: the CUDA kernels do not compile; nvcc says why above."]))
    return re.findall(r"^-- ia3_kernels: (.*(?:\n(?!-- ).*)*)", configured.stdout, re.MULTILINE)


def main() -> int:
    """Make the bundle; 0 if it is there, 2 if it cannot be made here."""
    parser = argparse.ArgumentParser(prog="make gpu-bundle", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", default="sm_90a", help="the one architecture to compile for; default: sm_90a")
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: build/gpu-bundle")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu-bundle-objects", help="where CMake works")
    arguments = parser.parse_args()
    try:
        architecture = capability(arguments.arch)
    except ValueError as error:
        parser.error(str(error))
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None:
            print(f"gpu-bundle: {tool} was not found, so nothing was compiled; install it, or put it on the PATH.")
            return 2
    started = time.monotonic()
    remarks = build(architecture, arguments.build.resolve())
    output: Path = arguments.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    for name in ("libia3_cuda.so", "cuda_sources.txt"):
        shutil.copy2(arguments.build / name, output)
    (output / "architecture.txt").write_text(f"{architecture}\n", "utf-8")
    for remark in remarks:
        print(f"gpu-bundle: {remark}")
    size = (output / "libia3_cuda.so").stat().st_size
    print(
        f"gpu-bundle: {output / 'libia3_cuda.so'} for {arguments.arch}: {size / 1e6:.1f} MB, "
        f"{time.monotonic() - started:.0f} s. Take the folder along, and type there: make gpu-check"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
