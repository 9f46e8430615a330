"""Compile every Triton kernel with every launch that ``ia3_kernels.launches`` makes, with no GPU, and read the code.

    python -m tools.inspect_kernels [--quick] [--jobs 2] [--write docs/kernels.md]

The kernels' own host functions run on meta tensors, which have shapes, strides and addresses but no memory. Each launch
is recorded, specialized as Triton's JIT would for that GPU, and compiled; from the machine code come registers, spills,
shared memory and the instructions that matter. Whatever breaks a promise of ``docs/kernels.md`` is printed, with exit
status 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import ia3_kernels.triton
from ia3_kernels import exact_gpu
from ia3_kernels.launches import FEW_ROWS, Architecture, activation_launch, exact_launch, weight_launch
from ia3_kernels.schemas import ACTIVATIONS, parity_shape, pattern_dtype
from ia3_kernels.triton import activation, exact, linear, scale_pair, weight

from .pages import table_in, write_table


@dataclass(frozen=True)
class Machine:
    """A GPU to compile for. matmul: the instruction, in assembly, of its 16-bit matmuls of more than 16 rows."""

    target: GPUTarget
    architecture: Architecture
    matmul: str


MACHINES = {
    "sm_80": Machine(GPUTarget("cuda", 80, 32), Architecture("cuda", 80, 108), "HMMA"),
    "sm_90": Machine(GPUTarget("cuda", 90, 32), Architecture("cuda", 90, 132), "HGMMA"),
    "sm_100": Machine(GPUTarget("cuda", 100, 32), Architecture("cuda", 100, 148), "UTCHMMA"),
    "gfx942": Machine(GPUTarget("hip", "gfx942", 64), Architecture("hip", 94, 304), "v_mfma"),
}

# The tensors that each kernel streams: the argument with their height, and the constants with the shape of a tile.
TILES = {
    "activation_fwd_kernel": dict.fromkeys(("gate", "up"), ("rows", "BLOCK_M", "BLOCK_N")),
    "activation_bwd_kernel": dict.fromkeys(("grad", "gate", "up"), ("rows", "BLOCK_M", "BLOCK_N")),
    "reduce_partials_kernel": {"partials": ("chunks", "BLOCK_M", "BLOCK_N")},
    "scale_pair_fwd_kernel": {"x": ("rows", "BLOCK_M", "BLOCK_N")},
    "scale_pair_bwd_kernel": dict.fromkeys(("grad_first", "grad_second", "x"), ("rows", "BLOCK_M", "BLOCK_N")),
    "reduce_pair_kernel": {"partials": ("chunks", "BLOCK_M", "BLOCK_N")},
    "scale_weight_kernel": {"weight": ("rows", "BLOCK_M", "BLOCK_N")},
    "exact_scale_kernel": {"weight": ("rows_per_group", "BLOCK_M", "BLOCK_N")},
    "stays_finite_kernel": {"weight": ("rows_per_group", "BLOCK_M", "BLOCK_N")},
    "linear_fwd_kernel": {"x": ("rows", "BLOCK_M", "BLOCK_K"), "weight": ("outputs", "BLOCK_N", "BLOCK_K")},
    "combine_fwd_kernel": {"partials": ("rows", "BLOCK_M", "BLOCK_N")},
}
# Those that have the loads of a tile in flight together before they use the first
STREAMING = set(TILES) - {"reduce_partials_kernel", "reduce_pair_kernel", "linear_fwd_kernel", "combine_fwd_kernel"}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Where nothing is aligned, every element has an address and a mask of its own; so few of those may leave the registers.
UNALIGNED_SPILLS = 32


# --- what is launched ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of one of our functions, in words and as such. is_aligned: every address and row is on 16 bytes."""

    label: str
    is_aligned: bool
    call: Callable[[Architecture], object]


def _empty(dtype: torch.dtype, *shape: int, is_aligned: bool = True) -> Tensor:
    """A matrix or vector without memory; not aligned, it begins one element late and its rows are one longer."""
    if is_aligned:
        return torch.empty(*shape, dtype=dtype, device="meta")
    return torch.empty(*shape[:-1], shape[-1] + 1, dtype=dtype, device="meta")[..., 1:]


def _linear(rows: int, outputs: int, inputs: int, dtype: torch.dtype, layout: str, kind: str, is_aligned: bool) -> Case:
    def call(architecture: Architecture) -> None:
        empty = functools.partial(_empty, is_aligned=is_aligned)
        w = empty(dtype, inputs, outputs).t() if layout == "in x out" else empty(dtype, outputs, inputs)
        lead, index = ((3,), empty(torch.int32, rows)) if kind == "adapters" else ((), None)
        output_scale = empty(torch.float32, *lead, outputs)
        input_scale = None if kind == "output" else empty(torch.float32, *lead, inputs)
        bias = empty(dtype, outputs) if kind == "bias, both" else None
        linear.matmul(empty(dtype, rows, inputs), w, bias, input_scale, output_scale, index, architecture=architecture)

    return Case(f"scaled_linear {rows} x {inputs} -> {outputs}, weight {layout}, scales: {kind}", is_aligned, call)


def _activation(
    rows: int, cols: int, dtype: torch.dtype, name: str, kind: str, is_gated: bool, is_backward: bool, is_aligned: bool
) -> Case:
    def call(architecture: Architecture) -> None:
        empty = functools.partial(_empty, is_aligned=is_aligned)
        gate = empty(dtype, rows, cols)
        up = empty(dtype, rows, cols) if is_gated else None
        index = empty(torch.int32, rows) if kind == "adapters" else None
        scale = None if kind == "none" else empty(torch.float32, *((3,) if kind == "adapters" else ()), cols)
        launch = activation_launch(rows, cols, dtype.itemsize, is_backward, architecture.lanes)
        if is_backward:
            wants = (True, is_gated, True)
            activation.backward(empty(dtype, rows, cols), gate, up, scale, name, index, wants, launch)
        else:
            activation.forward(gate, up, scale, name, index, launch=launch)

    direction = "backward" if is_backward else "forward"
    label = f"{name}{' gated' if is_gated else ''} {direction} {rows} x {cols}, scale: {kind}"
    return Case(label, is_aligned, call)


def _pair(rows: int, cols: int, dtype: torch.dtype, is_backward: bool, is_aligned: bool) -> Case:
    def call(architecture: Architecture) -> None:
        x, *grads = (_empty(dtype, rows, cols, is_aligned=is_aligned) for _ in range(3))
        scales = [_empty(torch.float32, cols, is_aligned=is_aligned) for _ in range(2)]
        launch = activation_launch(rows, cols, dtype.itemsize, is_backward, architecture.lanes)
        if is_backward:
            scale_pair.backward(*grads, x, *scales, (True, True, True), launch=launch)
        else:
            scale_pair.forward(x, *scales, launch=launch)

    return Case(f"scale_pair {'backward' if is_backward else 'forward'} {rows} x {cols}", is_aligned, call)


def _weight(rows: int, cols: int, dtype: torch.dtype, dim: int, is_aligned: bool) -> Case:
    def call(architecture: Architecture) -> None:
        scale = _empty(torch.float32, (rows, cols)[dim])
        launch = weight_launch(rows, cols, dtype.itemsize, architecture.lanes)
        weight.scale_weight_(_empty(dtype, rows, cols, is_aligned=is_aligned), scale, dim, launch)

    return Case(f"scale_weight_ {rows} x {cols}, dim {dim}", is_aligned, call)


def _exact(rows: int, cols: int, dtype: torch.dtype, step: str, dim: int, is_aligned: bool) -> Case:
    def call(architecture: Architecture) -> None:
        matrix = _empty(dtype, rows, cols, is_aligned=is_aligned)
        scale = _empty(torch.float32, *((1,) if dim else ()), (rows, cols)[dim])
        parity = _empty(torch.uint8, *parity_shape(matrix))
        launch = exact_launch(rows, architecture.lanes)
        counts = _empty(torch.int16, 4 + rows * -(-cols // launch.BLOCK_N))
        run = functools.partial(exact.exact_scale, launch=launch)
        if step == "check":
            run(exact_gpu.CHECK, matrix, None, scale, dim, workspace=counts)
            return
        old, new = None if step == "merge" else scale, None if step == "unmerge" else scale
        escapes = (_empty(torch.int64, 5), _empty(matrix.dtype, 5).view(pattern_dtype(dtype)))
        if step == "collect":
            found = (_empty(torch.int64, len(counts) - 4), *escapes)
            run(exact_gpu.COLLECT, matrix, old, new, dim, parity, *escapes, counts, *found)
        elif step == "take back":
            run(exact_gpu.TAKE_BACK, matrix, old, new, dim, parity, None, None, counts)
        else:
            run(exact_gpu.MOVE, matrix, old, new, dim, parity, None, None, None if new is None else counts)

    return Case(f"exact {step} {rows} x {cols}, dim {dim}", is_aligned, call)


STEPS = ("merge", "unmerge", "swap", "check", "collect", "take back")
# Llama-3.2-3B and 3.1-8B, (outputs, inputs): k and v, down, q and o, gate and up.
PROJECTIONS = ((1024, 3072), (1024, 4096), (3072, 8192), (4096, 14336))
OTHER_PROJECTIONS = ((3072, 3072), (4096, 4096), (8192, 3072), (14336, 4096))
TOKENS = (1, 4, 16, 32, 64, 512, 4096, 16384)
LAYOUTS = ("out x in", "in x out")
KINDS = ("output", "bias, both", "adapters")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def cases() -> Iterator[Case]:
    """Every kind of call, at the shapes of Llama, then at shapes that nothing divides."""
    for dtype, layout, tokens in product((BF16, FP16, FP32), LAYOUTS, TOKENS):
        for outputs, inputs in PROJECTIONS + OTHER_PROJECTIONS:
            yield _linear(tokens, outputs, inputs, dtype, layout, "output", True)
        # Those take it with few rows only
        for kind, (outputs, inputs) in product(KINDS[1:] if tokens <= FEW_ROWS else (), PROJECTIONS[::3]):
            yield _linear(tokens, outputs, inputs, dtype, layout, kind, True)
    for dtype, is_backward, tokens in product((BF16, FP16, FP32), (False, True), TOKENS):
        for kind, cols in product(("none", "one", "adapters"), (8192, 14336)):
            yield _activation(tokens, cols, dtype, "silu", kind, True, is_backward, True)
        for kind, cols in product(("one", "adapters"), (1024, 3072)):
            yield _activation(tokens, cols, dtype, "identity", kind, False, is_backward, True)
    for dtype, is_backward, is_gated, name in product((BF16, FP32), (False, True), (False, True), ACTIVATIONS):
        yield _activation(4096, 8192, dtype, name, "one", is_gated, is_backward, True)
    for dtype, is_backward, tokens, cols in product((BF16, FP16, FP32), (False, True), TOKENS, (3072, 4096)):
        yield _pair(tokens, cols, dtype, is_backward, True)
    for dtype, dim, shape in product((BF16, FP16, FP32), (0, 1), PROJECTIONS):
        yield _weight(*shape, dtype, dim, True)
    for dtype, step, dim in product((BF16, FP16, FP32), STEPS, (0, 1)):
        yield _exact(*PROJECTIONS[-1], dtype, step, dim, True)
        yield _exact(1023, 3071, dtype, step, dim, False)
    for dtype, (rows, outputs, inputs) in product(
        (BF16, FP16, FP32), ((1, 1, 1), (1, 33, 301), (7, 1023, 3071), (33, 70, 129), (700, 1023, 3071), (700, 5000, 1))
    ):
        for layout, kind in product(LAYOUTS, KINDS):
            yield _linear(rows, outputs, inputs, dtype, layout, kind, False)
        for is_backward, kind in product((False, True), ("one", "adapters")):
            yield _activation(rows, inputs, dtype, "silu", kind, True, is_backward, False)
        for is_backward in (False, True):
            yield _pair(rows, inputs, dtype, is_backward, False)
        for dim in (0, 1):
            yield _weight(outputs, inputs, dtype, dim, False)


def quick_cases() -> Iterator[Case]:
    """One call for every kernel and regime, in half a minute on two cores."""
    for tokens in (1, 16, 32, 4096):
        yield _linear(tokens, *PROJECTIONS[tokens > 16], BF16, LAYOUTS[0], "output", True)
    yield _linear(4096, *PROJECTIONS[2], FP16, LAYOUTS[1], "output", True)
    yield _linear(16, *PROJECTIONS[2], FP16, LAYOUTS[1], "adapters", True)
    yield _linear(512, *PROJECTIONS[0], FP32, LAYOUTS[0], "output", True)
    yield _linear(16, *PROJECTIONS[0], FP32, LAYOUTS[0], "bias, both", True)
    yield _linear(33, 70, 129, BF16, LAYOUTS[1], "bias, both", False)
    for dtype, is_backward in product((BF16, FP32), (False, True)):
        yield _activation(4096, 8192, dtype, "silu", "one", True, is_backward, True)
    for is_backward, is_aligned in product((False, True), (False, True)):
        yield _activation(700, 3072, BF16, "gelu", "adapters", False, is_backward, is_aligned)
    for is_backward, is_aligned in product((False, True), (False, True)):
        yield _pair(700, 3072, BF16, is_backward, is_aligned)
    for dim, is_aligned in product((0, 1), (False, True)):
        yield _weight(3072, 8192, BF16, dim, is_aligned)
    for dtype, step in product((BF16, FP32), STEPS):
        yield _exact(3072, 8192, dtype, step, 1, True)


# --- recording -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A kernel, specialized: what the compiler is given, and what we say about it."""

    machine: str
    kernel: str
    label: str
    is_aligned: bool
    constants: dict[str, Any]
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same program."""
        return repr((self.machine, self.kernel, self.signature, self.constexprs, self.attributes, self.options))

    @property
    def element_size(self) -> int:
        """Of the tensors that the kernel streams."""
        name = next(iter(TILES[self.kernel]))
        found = re.search("fp32|bf16|fp16", self.signature[name])
        assert found, f"{self.kernel} streams {name!r} of type {self.signature[name]!r}"
        return _BYTES[found[0]]

    @property
    def tile(self) -> str:
        """The launch parameters in a line; splits are told apart from wholes, not from each other."""
        named = [(name, self.constants[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in self.constants]
        text = " x ".join(str(value) for _, value in named) + f", {self.constants['num_warps']} warps"
        if self.constants.get("SPLIT_K", 1) > 1 and self.kernel == "linear_fwd_kernel":
            text += ", split"
        return text

    @property
    def row(self) -> tuple[str, int, str]:
        """The row of the table that it belongs to: kernel, bits of an element, launch parameters."""
        return self.kernel, 8 * self.element_size, self.tile


@functools.cache
def kernels() -> dict[str, JITFunction[Any]]:
    """Every kernel in ``ia3_kernels.triton`` by its name; functions that kernels call are not kernels."""
    found = {}
    for module in pkgutil.iter_modules(ia3_kernels.triton.__path__, "ia3_kernels.triton."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and isinstance(value, JITFunction):
                found[name] = value
    return found


@contextmanager
def _recording(record: Callable[..., None]) -> Iterator[None]:
    """Kernels call `record` with their name and arguments instead of running."""

    def run(name: str, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        record(name, args, kwargs)

    replaced = kernels()
    for name, kernel in replaced.items():
        kernel.run = functools.partial(run, name)
    try:
        yield
    finally:
        for kernel in replaced.values():
            del kernel.run


def launches(machine: str, chosen: Iterable[Case]) -> dict[str, Launch]:
    """The distinct programs that these calls need on a machine, by their keys."""
    target, architecture = MACHINES[machine].target, MACHINES[machine].architecture
    backend = make_backend(target)
    found: dict[str, Launch] = {}
    # The JIT's own way from arguments to a specialization.
    binders = {
        name: create_function_from_signature(kernel.signature, kernel.params, backend)
        for name, kernel in kernels().items()
    }

    def record(case: Case, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound, specialization, options = binders[name](*args, **kwargs)
        options, signature, constexprs, attributes = kernels()[name]._pack_args(
            backend, kwargs, bound, specialization, options
        )
        label = case.label if case.is_aligned else f"{case.label}, not aligned"
        launch = Launch(
            machine,
            name,
            label,
            case.is_aligned,
            {key: value for key, value in kwargs.items() if key.isupper() or key.startswith("num_")},
            signature,
            constexprs,
            attributes,
            dict(vars(options)),
        )
        found.setdefault(launch.key, launch)

    for case in chosen:
        with _recording(functools.partial(record, case)):
            case.call(architecture)
    return found


# --- compiling and reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What a launch compiled to. spilled, shared: bytes; instructions: how often those of `_INSTRUCTIONS` occur.

    in_flight: the most wide loads between two branches with no store among them, in NVIDIA's assembly.
    """

    launch: Launch
    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]
    in_flight: int


# NVIDIA's matmuls, wide loads, TMA; AMD's matmuls and wide loads. 32-byte loads (Blackwell) count as wide.
_INSTRUCTIONS = {
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "UTCHMMA": r"\bUTCHMMA\b",
    "v_mfma": r"\bv_mfma_",
    "TMA": r"\bUTMALDG\b",
    "wide load": r"\b(?:LDG|LDGSTS)\.[\w.]*\b(?:128|256)\b|\b(?:global|buffer)_load_dwordx4\b",
}


def _number(name: str, text: str) -> int:
    found = re.search(rf"{re.escape(name)}:\s*(\d+)", text)
    if found is None:
        raise RuntimeError(f"the compiler's output does not say {name!r}; this tool needs to learn its new format.")
    return int(found[1])


def _read_nvidia(cubin: bytes) -> tuple[int, int, str]:
    """Registers, spilled bytes, assembly. What is spilled lies on the stack; our kernels keep nothing else there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number("REG", text), _number("STACK", text) + _number("LOCAL", text), text


def _read_amd(assembly: str) -> tuple[int, int, str]:
    """The same. Scalar registers spill into lanes of vector registers, and count among those."""
    spilled = max(4 * _number(".vgpr_spill_count", assembly), _number(".private_segment_fixed_size", assembly))
    return _number(".vgpr_count", assembly), spilled, assembly


def compile_launch(launch: Launch) -> Compiled:
    """Compile to machine code, or take it from Triton's cache."""
    source = ASTSource(kernels()[launch.kernel], launch.signature, launch.constexprs, launch.attributes)
    program = triton.compile(source, target=MACHINES[launch.machine].target, options=launch.options)
    if "cubin" in program.asm:
        registers, spilled, assembly = _read_nvidia(program.asm["cubin"])
    else:
        registers, spilled, assembly = _read_amd(program.asm["amdgcn"])
    instructions = Counter({name: len(re.findall(form, assembly)) for name, form in _INSTRUCTIONS.items()})
    blocks = (block for block in re.split(r"\bBRA\b", assembly) if not re.search(r"\bSTG\b", block))
    in_flight = max((len(re.findall(_INSTRUCTIONS["wide load"], block)) for block in blocks), default=0)
    return Compiled(launch, registers, spilled, program.metadata.shared, instructions, in_flight)


def compile_all(wanted: Iterable[Launch], jobs: int) -> list[Compiled]:
    """Compile in this many processes."""
    wanted = list(wanted)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = []
        for result in pool.map(compile_launch, wanted, chunksize=4):
            results.append(result)
            if sys.stderr.isatty():
                print(f"\r{len(results)} of {len(wanted)}", end="", file=sys.stderr)
    return results


# --- judging -------------------------------------------------------------------------------------------------------


def _expected_wide_loads(launch: Launch) -> int:
    """16-byte loads a thread needs for one tile of each tensor that comes by pointer; tiles too small need none."""
    threads = launch.constants["num_warps"] * MACHINES[launch.machine].target.warp_size
    expected = 0
    for name, (dimension, height, width) in TILES[launch.kernel].items():
        if launch.signature[name].startswith("*"):
            # A height of 1 is a constant, by which the compiler drops the loads of all other rows.
            rows = 1 if launch.signature[dimension] == "constexpr" else launch.constants[height]
            expected += rows * launch.constants[width] * launch.element_size // (16 * threads)
    return expected


def problems(compiled: Compiled) -> list[str]:
    """What breaks a promise, a sentence each."""
    launch, found = compiled.launch, []
    machine = MACHINES[launch.machine]
    limit = machine.architecture.shared_memory
    if compiled.spilled > (0 if launch.is_aligned else UNALIGNED_SPILLS):
        found.append(f"spills {compiled.spilled} bytes of registers")
    if compiled.shared > limit:
        found.append(f"needs {compiled.shared} bytes of shared memory; the limit is {limit}")
    if launch.is_aligned:
        expected = _expected_wide_loads(launch)
        if compiled.instructions["wide load"] < expected:
            found.append(f"has {compiled.instructions['wide load']} 16-byte loads; expected at least {expected}")
        is_tile = launch.kernel in STREAMING and launch.constants["BLOCK_M"] > 1 and machine.target.backend == "cuda"
        if is_tile and compiled.in_flight < expected:
            found.append(f"has {compiled.in_flight} 16-byte loads in flight together; expected at least {expected}")
        if launch.constants.get("TMA") and not compiled.instructions["TMA"]:
            found.append("does not use TMA, with which it is launched")
        is_matmul = launch.kernel == "linear_fwd_kernel" and launch.element_size == 2
        if is_matmul and launch.constants["BLOCK_M"] > 16 and not compiled.instructions[machine.matmul]:
            found.append(f"has no {machine.matmul} instruction")
    kind = f"{launch.label}; {8 * launch.element_size} bits; {launch.tile}"
    return [f"{launch.machine}: {launch.kernel} ({kind}) {text}." for text in found]


# --- the table -----------------------------------------------------------------------------------------------------


def _cell(group: list[Compiled]) -> str:
    """Most registers, most shared memory, matmul instruction, TMA."""
    if not group:
        return ""
    parts = [f"{max(entry.registers for entry in group)} r"]
    shared = max(entry.shared for entry in group)
    if shared:
        parts.append(f"{shared / 1024:.0f} KiB" if shared >= 1024 else f"{shared} B")
    names = [
        name for name in ("UTCHMMA", "HGMMA", "HMMA", "v_mfma") if any(entry.instructions[name] for entry in group)
    ]
    parts += names
    parts += ["TMA"] if any(entry.instructions["TMA"] for entry in group) else []
    return " · ".join(parts)


def table(results: Iterable[Compiled]) -> str:
    """Markdown, a row for each kernel, width and tile; a cell has the largest figures of its aligned programs."""
    rows: dict[tuple[str, int, str], dict[str, list[Compiled]]] = defaultdict(lambda: defaultdict(list))
    count: Counter[str] = Counter()
    for result in results:
        count[result.launch.machine] += 1
        if result.launch.is_aligned:
            rows[result.launch.row][result.launch.machine].append(result)
    programs = ", ".join(f"{count[machine]} for {machine}" for machine in MACHINES)
    lines = [
        f"Triton {triton.__version__}; programs compiled: {programs}.",
        "",
        f"| kernel | bits | tile | {' | '.join(MACHINES)} |",
        f"|---|---|---|{'---|' * len(MACHINES)}",
    ]

    def order(key: tuple[str, int, str]) -> tuple[Any, ...]:
        return list(TILES).index(key[0]), key[1], [int(number) for number in re.findall(r"\d+", key[2])], key[2]

    for key in sorted(rows, key=order):
        cells = " | ".join(_cell(rows[key][machine]) for machine in MACHINES)
        lines.append(f"| `{key[0]}` | {key[1]} | {key[2]} | {cells} |")
    return "\n".join(lines)


def listed_rows(page: str) -> list[tuple[str, int, str]]:
    """The rows of the table in a page."""
    found = re.findall(r"^\| `(\w+)` \| (\d+) \| (.+?) \|", table_in(page, "triton"), re.MULTILINE)
    return [(kernel, int(bits), tile) for kernel, bits, tile in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one launch for every kernel and regime")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), help="processes; default: one a core")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page; default: print it")
    arguments = parser.parse_args()
    chosen = list(quick_cases() if arguments.quick else cases())
    wanted = [launch for machine in MACHINES for launch in launches(machine, chosen).values()]
    results = compile_all(wanted, arguments.jobs)
    broken = [text for result in results for text in problems(result)]
    for text in broken:
        print(text, file=sys.stderr)
    if not broken and arguments.write:
        write_table(arguments.write, "triton", table(results))
    else:
        print(table(results))
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
