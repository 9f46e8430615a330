"""Compile every CUDA kernel for every architecture, with no GPU, and read what came out.

    python -m tools.inspect_cuda [--build build/cuda] [--write docs/kernels.md]

Builds the library ``ia3_cuda``, and reads two things: what ptxas says of each kernel (registers, stack, spills, a
pipeline of ``wgmma`` that it had to serialize), and the machine code (matmul instructions, wide loads, TMA). Whatever
breaks a promise of ``docs/kernels.md`` is printed, with exit status 1. Where nvcc is missing, it says so in one line,
and succeeds: there is nothing that could be wrong.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .pages import write_table

ROOT = Path(__file__).resolve().parents[1]
LOG = "ptxas.log"

# What the machine code of a kernel must hold: its name, and the instructions of which it needs one at least.
WIDE = ("LDG.128", "TMA")
PROMISES = {
    "activation_fwd_kernel": WIDE,
    "activation_bwd_kernel": WIDE,
    "scale_pair_fwd_kernel": WIDE,
    "scale_pair_bwd_kernel": WIDE,
    "scale_weight_kernel": WIDE,
    "exact_scale_kernel": WIDE,
    "stays_finite_kernel": WIDE,
    "mark_units_kernel": (),
    "hopper_linear_fwd_kernel": ("HGMMA",),
}

_INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\b",
    "LDG.128": r"\bLDG\.[\w.]*\b128\b",
    "STG.128": r"\bSTG\.[\w.]*\b128\b",
    "TMA": r"\bUTMALDG\b",
}


@dataclass
class Program:
    """A kernel's machine code for one architecture. stack, spilled: bytes; shared: bytes known when compiling."""

    kernel: str  # as a person reads it, with template arguments
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def family(self) -> str:
        """The kernel's name without namespaces and template arguments."""
        if "cutlass" in self.kernel:
            return "hopper_linear_fwd_kernel"
        found = re.search(r"(\w+_kernel)\b", self.kernel)
        return found[1] if found else self.kernel


def _demangle(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def latest(log: str) -> str:
    """What was said when each object was last built: Ninja announces it in a line that begins with [1/12]."""
    parts = re.split(r"(?m)^\[\d+/\d+\] ", log)[1:]
    return "\n".join({part.partition("\n")[0]: part for part in parts}.values())


def read_ptxas(log: str) -> dict[tuple[str, str], Program]:
    """What ptxas said of each kernel, by its mangled name and architecture."""
    programs = {}
    entry = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for found in entry.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        spilled = int(found["stores"]) + int(found["loads"])
        programs[found["name"], found["architecture"]] = Program(
            found["name"],
            found["architecture"],
            int(found["registers"]),
            int(found["stack"]),
            spilled,
            int(shared[1]) if shared else 0,
        )
    readable_names = _demangle({name for name, _ in programs})
    for (name, _), program in programs.items():
        program.kernel = readable_names[name]
    return programs


def read_machine_code(objects: Iterable[Path], programs: dict[tuple[str, str], Program]) -> None:
    """Counts the instructions of each program."""
    from triton import knobs

    tool = shutil.which("cuobjdump") or knobs.nvidia.cuobjdump.path
    for path in objects:
        text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
        for section in re.split(r"(?m)^\s*arch = ", text)[1:]:
            architecture = section.split(None, 1)[0]
            for function in re.split(r"(?m)^\s*Function : ", section)[1:]:
                program = programs.get((function.split(None, 1)[0], architecture))
                if program is not None:
                    program.instructions += Counter(
                        {name: len(re.findall(form, function)) for name, form in _INSTRUCTIONS.items()}
                    )


def _is_wide(program: Program) -> bool:
    """Whether the kernel is the one for aligned operands: its second argument, the length of its vectors, is not 1."""
    size = re.search(r"_kernel<[^,<>]+, (?:\(int\))?(\d+|true|false|\(bool\)[01])[,>]", program.kernel)
    return size is None or size[1] not in ("1", "false", "(bool)0")


def problems(programs: Iterable[Program], log: str) -> list[str]:
    """What breaks a promise, a sentence each."""
    found = []
    for program in programs:
        where = f"{program.architecture}: {program.kernel}"
        if program.stack or program.spilled:
            found.append(
                f"{where} has {program.stack} bytes of local memory, and spills {program.spilled} of registers."
            )
        promised = PROMISES.get(program.family)
        if promised is None:
            found.append(f"{where} is not a kernel that tools/inspect_cuda.py knows; say there what it promises.")
        elif promised and _is_wide(program) and not any(program.instructions[name] for name in promised):
            found.append(f"{where} has no {' or '.join(promised)} instruction.")
    if "C7510" in log:
        found.append("ptxas serialized wgmma instructions (C7510); see the log.")
    return found


def _cell(group: list[Program]) -> str:
    """How many programs, most registers, most shared memory known when compiling, the instructions that matter."""
    if not group:
        return ""
    parts = [f"{len(group)}", f"{max(program.registers for program in group)} r"]
    shared = max(program.shared for program in group)
    parts += [f"{shared / 1024:.0f} KiB"] if shared >= 1024 else [f"{shared} B"] if shared else []
    parts += [name for name in _INSTRUCTIONS if any(program.instructions[name] for program in group)]
    return " · ".join(parts)


def table(programs: Iterable[Program], compiler: str) -> str:
    """Markdown, a row for each kernel."""
    cells: dict[str, dict[str, list[Program]]] = defaultdict(lambda: defaultdict(list))
    for program in programs:
        cells[program.family][program.architecture].append(program)
    architectures = sorted({name for row in cells.values() for name in row}, key=lambda name: int(name[3:].rstrip("a")))
    lines = [
        f"nvcc {compiler}.",
        "",
        f"| kernel | {' | '.join(architectures)} |",
        f"|---|{'---|' * len(architectures)}",
    ]
    for kernel in sorted(cells, key=list(PROMISES).index):
        lines.append(f"| `{kernel}` | {' | '.join(_cell(cells[kernel][name]) for name in architectures)} |")
    return "\n".join(lines)


def build(folder: Path) -> str:
    """Compile what is out of date; what ptxas said of everything in the folder so far."""
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DIA3_CUDA=ON"]
    subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options], check=True)
    process = subprocess.Popen(
        ["cmake", "--build", folder, "--target", "ia3_cuda"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = folder / LOG
    with open(log, "a", encoding="utf-8") as file:
        for line in process.stdout or ():
            file.write(line)
            if not line.startswith("ptxas info"):
                print(line, end="", flush=True)
    if process.wait():
        raise SystemExit(f"the CUDA kernels do not compile; {log} says why.")
    return latest(log.read_text("utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda", help="folder; default: build/cuda")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page; default: print it")
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("inspect_cuda: nvcc was not found, so the CUDA kernels were neither compiled nor inspected.")
        return 0
    log = build(arguments.build)
    programs = read_ptxas(log)
    objects = [path for path in arguments.build.rglob("*.o") if path.name.endswith(".cu.o")]
    read_machine_code(objects, programs)
    if not programs:
        raise SystemExit(f"{arguments.build / LOG} says nothing of any kernel; delete {arguments.build} and run again.")
    broken = problems(programs.values(), log)
    for text in broken:
        print(text, file=sys.stderr)
    if broken:
        return 1
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    text = table(programs.values(), re.findall(r"V([\d.]+)", version)[0])
    if arguments.write:
        write_table(arguments.write, "cuda", text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
