"""Ask cuBLASLt whether a bf16 matmul of its own multiplies each output feature by an fp32 vector; if so, measure it.

    python -m tools.probe_cublaslt [--json PATH] [--dry-run]

``y = (x Wᵀ) ∘ s``, x [T, K], W [N, K], y [T, N], all by rows, is to cuBLASLt a matrix D [N, T] by columns, of which
``s`` multiplies the rows: what its pointer modes with a vector for alpha do, in the library's own kernel, on the fp32
sums. Whether any bf16 algorithm offers them on this GPU nobody but the library can say. It is asked three times: which
algorithms there are and what they can do, what its heuristic would run for a shape, and whether that gives the right
numbers. Then the best that it offers is timed in CUDA graphs, with weights that are not in the cache, against
``F.linear`` without a vector.

Needs a GPU, and the libcublasLt that torch brings; compiles nothing. ``--dry-run`` goes the same way on the CPU, with a
stand-in that computes the formula.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from bench import measure, records  # noqa: E402  (run as a file, it must find the checkout first)

# --- cublasLt.h, as of CUDA 12 and 13 -----------------------------------------------------------------------------

R_32F, R_16BF = 0, 14  # cudaDataType
COMPUTE_32F = 68
OP_T = 1
DESC_POINTER_MODE, DESC_TRANSA = 2, 3
PREF_MAX_WORKSPACE_BYTES = 1
CAP_POINTER_MODE_MASK = 11
# cublasLtPointerMode_t. The bit of a mode in an algorithm's mask is 1 << mode.
HOST = 0
MODES = {
    "ALPHA_DEVICE_VECTOR_BETA_ZERO": 3,
    "ALPHA_DEVICE_VECTOR_BETA_HOST": 4,
    "DEVICE_VECTOR": 2,
}
_CANDIDATES = 4
_WORKSPACE = 32 << 20
_CACHE = 100 << 20  # bytes of weights that no GPU's cache holds
_MOST_ALGORITHMS = 1000


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t: opaque."""

    _fields_ = (("data", ctypes.c_uint64 * 8),)


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm, and what it takes."""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Unavailable(RuntimeError):
    """Why nothing can be asked here, in a sentence."""


def library_path(major: str) -> Iterator[str]:
    """Where libcublasLt of this CUDA version may be: loaded by torch already, among its packages, or in a toolkit."""
    name = f"libcublasLt.so.{major}"
    yield name
    packages = Path(torch.__file__).parents[1] / "nvidia"
    yield from map(str, sorted(packages.glob(f"*/lib/{name}")))
    yield f"/usr/local/cuda/lib64/{name}"


def load(paths: Sequence[str]) -> ctypes.CDLL:
    """Load the first of ``paths`` that can be loaded, with the types of what is called.

    Raises Unavailable if none can.
    """
    reasons = []
    for path in paths:
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            reasons.append(str(error))
            continue
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        library.cublasLtGetVersion.restype = size
        library.cublasLtGetStatusString.restype = ctypes.c_char_p
        library.cublasLtMatrixLayoutCreate.argtypes = [pointer, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, size]
        for function in (library.cublasLtMatmulDescSetAttribute, library.cublasLtMatmulPreferenceSetAttribute):
            function.argtypes = [pointer, ctypes.c_int, pointer, size]
        library.cublasLtMatmul.argtypes = [pointer] * 14 + [size, pointer]
        return library
    raise Unavailable(
        f"libcublasLt could not be loaded ({'; '.join(reasons)}); run this with the torch whose cuBLAS is meant."
    )


class CublasLt:
    """The calls that are needed of the library. Handles and descriptors live as long as the process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._handle = ctypes.c_void_p()

    @property
    def version(self) -> int:
        found: int = self.library.cublasLtGetVersion()
        return found

    def open(self) -> None:
        """Make the handle, which takes a GPU. Raises Unavailable without one."""
        self._call("Create", ctypes.byref(self._handle))
        self._workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device="cuda")

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, f"cublasLt{name}")(*arguments)
        if status:
            words = self.library.cublasLtGetStatusString(status).decode()
            raise Unavailable(f"cublasLt{name} refused with status {status}: {words}.")

    def operation(self, mode: int) -> ctypes.c_void_p:
        """The descriptor of ``D = alpha · Aᵀ B``, computed in fp32, with the pointer mode."""
        made = ctypes.c_void_p()
        self._call("MatmulDescCreate", ctypes.byref(made), COMPUTE_32F, R_32F)
        for attribute, value in ((DESC_POINTER_MODE, mode), (DESC_TRANSA, OP_T)):
            number = ctypes.c_int32(value)
            self._call("MatmulDescSetAttribute", made, attribute, ctypes.byref(number), ctypes.sizeof(number))
        return made

    def layout(self, rows: int, columns: int) -> ctypes.c_void_p:
        """The descriptor of a bf16 matrix by columns, none skipped."""
        made = ctypes.c_void_p()
        self._call("MatrixLayoutCreate", ctypes.byref(made), R_16BF, rows, columns, rows)
        return made

    def preference(self) -> ctypes.c_void_p:
        """The descriptor of what the heuristic may use."""
        made = ctypes.c_void_p()
        self._call("MatmulPreferenceCreate", ctypes.byref(made))
        most = ctypes.c_uint64(_WORKSPACE)
        self._call(
            "MatmulPreferenceSetAttribute", made, PREF_MAX_WORKSPACE_BYTES, ctypes.byref(most), ctypes.sizeof(most)
        )
        return made

    def masks(self) -> list[int]:
        """The pointer modes of each bf16 algorithm there is, as bits."""
        types = (COMPUTE_32F, R_32F, R_16BF, R_16BF, R_16BF, R_16BF)
        numbers, count = (ctypes.c_int * _MOST_ALGORITHMS)(), ctypes.c_int()
        self._call("MatmulAlgoGetIds", self._handle, *types, _MOST_ALGORITHMS, numbers, ctypes.byref(count))
        masks = []
        for number in numbers[: count.value]:
            algorithm, mask, written = Algorithm(), ctypes.c_uint32(), ctypes.c_size_t()
            try:
                self._call("MatmulAlgoInit", self._handle, *types, number, ctypes.byref(algorithm))
            except Unavailable:
                continue  # of another architecture
            self._call(
                "MatmulAlgoCapGetAttribute",
                ctypes.byref(algorithm),
                CAP_POINTER_MODE_MASK,
                ctypes.byref(mask),
                ctypes.c_size_t(ctypes.sizeof(mask)),
                ctypes.byref(written),
            )
            masks.append(mask.value)
        return masks

    def candidates(self, mode: int, rows: int, outputs: int, inputs: int) -> list[Callable[..., Tensor]]:
        """What the heuristic would run in this mode, best first: functions of x, weight, scale and result."""
        operation = self.operation(mode)
        a, b, d = self.layout(inputs, outputs), self.layout(inputs, rows), self.layout(outputs, rows)
        found, count = (HeuristicResult * _CANDIDATES)(), ctypes.c_int()
        matrices = (operation, a, b, d, d, self.preference())
        try:
            self._call("MatmulAlgoGetHeuristic", self._handle, *matrices, _CANDIDATES, found, ctypes.byref(count))
        except Unavailable:
            return []  # it says "not supported", as it does where it knows of none
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        zeros = torch.zeros(outputs, device="cuda")

        def function(result: HeuristicResult) -> Callable[..., Tensor]:
            def matmul(x: Tensor, weight: Tensor, scale: Tensor, y: Tensor) -> Tensor:
                alpha = ctypes.addressof(one) if mode == HOST else scale.data_ptr()
                beta = zeros.data_ptr() if mode == MODES["DEVICE_VECTOR"] else ctypes.addressof(zero)
                self._call(
                    "Matmul",
                    *(self._handle, operation, alpha, weight.data_ptr(), a, x.data_ptr(), b, beta),
                    *(y.data_ptr(), d, y.data_ptr(), d, ctypes.addressof(result.algorithm)),
                    *(self._workspace.data_ptr(), result.workspace, torch.cuda.current_stream().cuda_stream),
                )
                return y

            return matmul

        return [function(result) for result in found[: count.value] if result.state == 0]


class StandIn:
    """The formula on the CPU in place of the library, so that a dry run goes the whole way."""

    version = 0

    def open(self) -> None:
        pass

    def masks(self) -> list[int]:
        return [1 << HOST, 1 << HOST | 1 << MODES["ALPHA_DEVICE_VECTOR_BETA_ZERO"]]

    def candidates(self, mode: int, rows: int, outputs: int, inputs: int) -> list[Callable[..., Tensor]]:
        def matmul(x: Tensor, weight: Tensor, scale: Tensor, y: Tensor) -> Tensor:
            product = x.float() @ weight.float().t()
            return y.copy_(product if mode == HOST else product * scale)

        return [matmul] if mode in (HOST, MODES["ALPHA_DEVICE_VECTOR_BETA_ZERO"]) else []


# --- the questions ------------------------------------------------------------------------------------------------

# Outputs x inputs of Llama-3.2-3B and Llama-3.1-8B: keys and values, queries, the down projection.
SHAPES = ((1024, 3072), (1024, 4096), (3072, 3072), (4096, 4096), (3072, 8192), (4096, 14336))
ROWS = (1, 16, 64, 512, 2048, 4096, 16384)
TINY = ((64, 32), (48, 64)), (1, 16)


def _error(result: Tensor, oracle: Tensor) -> float:
    return float((result.double() - oracle).norm() / oracle.norm())


def _is_right(y: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether ``y`` is the formula, by no more than twice the error of torch's own, on its first rows.

    Torch rounds the product before it multiplies; the floor is the one rounding that neither can do without.
    """
    x, y = x[:64], y[:64]
    oracle = x.double() @ weight.double().t()
    eager = F.linear(x, weight)
    if scale is not None:
        oracle, eager = oracle * scale.double(), (eager * scale).to(eager.dtype)
    return _error(y, oracle) <= 2 * max(_error(eager, oracle), torch.finfo(y.dtype).eps / 2)


def _measure(
    library: CublasLt | StandIn, modes: Sequence[str], shape: tuple[int, int], rows: int, device: torch.device
) -> tuple[dict[str, list[float]], set[str]]:
    """Seconds of ``F.linear``, of the library's plain mode, and of each mode that it offers; and those that err."""
    outputs, inputs = shape
    on_gpu = device.type == "cuda"
    x = torch.randn(rows, inputs, device=device).bfloat16()
    weight = (torch.randn(outputs, inputs, device=device) / inputs**0.5).bfloat16()
    scale = 1 + 0.2 * torch.randn(outputs, device=device)
    count = max(4, math.ceil(_CACHE / weight.nbytes)) if on_gpu else 2
    weights = [weight.clone() for _ in range(count)]
    results = torch.empty(rows, outputs, device=device, dtype=torch.bfloat16)

    def timed(function: Callable[[Tensor], object]) -> Callable[[], object]:
        """A call with each weight in turn, so with one that has left the cache, as in a model."""
        pool = itertools.cycle(weights)
        if on_gpu:
            return measure.captured(lambda: function(next(pool)), count)
        return lambda: [function(next(pool)) for _ in range(count)]

    functions = {"linear": timed(lambda w: F.linear(x, w))}
    wrong = set()
    for name, mode in {"plain": HOST, **{name: MODES[name] for name in modes}}.items():
        candidates = []
        for candidate in library.candidates(mode, rows, outputs, inputs):
            results.fill_(float("nan"))
            try:
                candidate(x, weight, scale, results)
            except Unavailable:
                continue
            if _is_right(results, x, weight, None if mode == HOST else scale):
                candidates.append(timed(lambda w, run=candidate: run(x, w, scale, results)))
            else:
                wrong.add(name)
        if candidates:
            tried = measure.interleave({f"{i}": run for i, run in enumerate(candidates)}, 3, 1, device=device)
            functions[name] = candidates[min(range(len(candidates)), key=lambda i: min(tried[f"{i}"]))]
    times = measure.interleave(functions, 20 if on_gpu else 3, 2, device=device)
    return {name: [value / count for value in values] for name, values in times.items()}, wrong


def probe(library: CublasLt | StandIn, device: torch.device, path: Path | None) -> list[str]:
    """Ask, run and time; the lines to show. The records go to ``path``."""
    library.open()
    masks = library.masks()
    lines = [f"cuBLASLt {library.version}: {len(masks)} bf16 algorithms"]
    offered = {name: sum(mask >> mode & 1 for mask in masks) for name, mode in MODES.items()}
    lines += [f"  {count} of them offer {name}" for name, count in offered.items()]
    shapes, many = (SHAPES, ROWS) if device.type == "cuda" else TINY
    recorder = records.Recorder(device)
    ratios: dict[str, dict[str, float]] = {}
    wrong: set[str] = set()
    for (outputs, inputs), rows in itertools.product(shapes, many):
        # The heuristic is asked whatever the algorithms say of themselves: it is what would choose.
        times, erring = _measure(library, list(MODES), (outputs, inputs), rows, device)
        wrong |= erring
        case = f"{rows} rows, {inputs} -> {outputs}"
        recorder.add_times("probe", case, "bf16", times, {name: ("linear",) for name in times if name != "linear"})
        for name, values in times.items():
            ratios.setdefault(name, {})[case] = measure.paired_ratio(values, times["linear"])
    if path is not None:
        records.write(path, recorder.records)
    cases = len(shapes) * len(many)
    lines.append(f"over F.linear without a vector, {cases} shapes: geometric mean; worst")
    for name in ("plain", *MODES):
        found = ratios.get(name, {})
        if name in wrong:
            lines.append(f"  {name}: WRONG NUMBERS on some shape")
        if not found:
            lines.append(f"  {name}: the heuristic has nothing for any shape")
            continue
        mean = math.exp(sum(map(math.log, found.values())) / len(found))
        worst = max(found, key=lambda case: found[case])
        some = "" if len(found) == cases else f", on {len(found)} shapes only"
        lines.append(f"  {name}: {mean:.3f}; {found[worst]:.3f} ({worst}){some}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Probe; 0 if the library could be asked, whatever it said, 2 if there is no GPU or no library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the times there, as `bench` does")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a stand-in for the library")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        if arguments.dry_run:
            lines = probe(StandIn(), torch.device("cpu"), arguments.json)
        elif not torch.cuda.is_available() or torch.version.cuda is None:
            raise Unavailable("torch finds no NVIDIA GPU here, and only one can say what its cuBLAS offers.")
        else:
            major = torch.version.cuda.partition(".")[0]
            lines = probe(CublasLt(load([*library_path(major)])), torch.device("cuda"), arguments.json)
    except Unavailable as problem:
        print(f"probe_cublaslt: {problem}")
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
