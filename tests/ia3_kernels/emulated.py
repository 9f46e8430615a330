"""csrc/cuda compiled for the host (``cuda_emulator``), behind its C interface, on CPU tensors.

Everything that a kernel is given lies in memory of NaN, and what it writes in memory that must stay as it was.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ia3_kernels import ACTIVATIONS
from ia3_kernels.chunks import chunks_by_adapter

from .c_interface import (
    OK,
    ActivationArgs,
    BackwardArgs,
    Chunks,
    Scale,
    ScalePairArgs,
    ScalePairBackwardArgs,
    ScaleWeightArgs,
)

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).with_name("cuda_emulator")
SOURCES = [
    *(
        ROOT / "csrc/cuda" / f"{name}.cu"
        for name in ("activation", "activation_backward", "exact_scale", "scale_pair", "weight")
    ),
    *(ROOT / "csrc/cuda" / f"{name}.cpp" for name in ("hopper_dispatch", "status")),
    EMULATOR / "scalars.cpp",
]
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ was not found, which compiles the CUDA emulator")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of ia3_dtype
NAN = float("nan")
UNTOUCHED = 77.0  # around what kernels write: what they compute from the NaN around their inputs differs from it


class Failure(Exception):
    """A status other than IA3_OK, with the sentence of ia3_last_error()."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


# --- the library ---------------------------------------------------------------------------------------------------


def compile_source(source: Path, folder: Path) -> Path:
    made = folder / f"{source.name}.o"
    # Without _FORTIFY_SOURCE, which takes the emulator's jumps between stacks for an attack.
    options = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{EMULATOR}", "-Wno-unknown-pragmas"]
    facts = ["-DIA3_CUDA_ARCHITECTURES=80,90", '-DIA3_CUDA_SOURCES="emulated"']
    command = [str(COMPILER), *options, *facts, "-x", "c++", "-c", str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled once a session."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: compile_source(source, folder), SOURCES))
        made = folder / "emulated.so"
        subprocess.run([str(COMPILER), "-shared", *map(str, objects), "-o", str(made)], check=True)
        loaded = ctypes.CDLL(str(made))
    loaded.ia3_last_error.restype = ctypes.c_char_p
    loaded.emulator_launches.restype = ctypes.c_int64
    loaded.emulated_rows_per_chunk.restype = ctypes.c_int64
    loaded.emulated_sum.restype = ctypes.c_float
    for function in ("activation_backward", "scale_pair_backward"):
        getattr(loaded, f"ia3_cuda_{function}_workspace").restype = ctypes.c_size_t
    return loaded


def call(function: str, args: ctypes.Structure) -> None:
    """Run a function of the C interface; raises Failure."""
    status = getattr(library(), f"ia3_cuda_{function}")(ctypes.byref(args), None)
    if status != OK:
        raise Failure(status, library().ia3_last_error().decode())


# --- tensors for it ------------------------------------------------------------------------------------------------


def between(tensor: Tensor, offset: int = 0, stride_offset: int = 0, around: float = NAN) -> Tensor:
    """The same values as a view in memory that holds ``around``, with rows on 16 bytes.

    offset, stride_offset: elements by which the first row, and the distance between rows, miss that.
    """
    rows, cols = (1, tensor.numel()) if tensor.dim() == 1 else tensor.shape
    stride = -(-cols // 8) * 8 + 32 + stride_offset
    memory = torch.full(((rows + 1) * stride + 64,), around).to(tensor.dtype)
    view = memory.as_strided((rows, cols), (stride, 1), 32 + offset)
    view.copy_(tensor.reshape(rows, cols))
    return view[0] if tensor.dim() == 1 else view


def intact(view: Tensor) -> bool:
    """Whether the memory around a view that a kernel wrote still holds UNTOUCHED."""
    memory = view._base
    assert memory is not None
    return int((memory == UNTOUCHED).sum()) == memory.numel() - int((view != UNTOUCHED).sum())


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or not tensor.numel() else tensor.data_ptr()


def _pointers(pair: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * 2)(*map(_pointer, pair))


def _scale(scale: Tensor | None, index: Tensor | None) -> Scale:
    adapters = 0 if scale is None or scale.dim() == 1 else scale.shape[0]
    return Scale(_pointer(scale), _pointer(index), adapters)


def dense(tensor: Tensor, offset: int = 0, around: float = NAN) -> Tensor:
    """The same values contiguous in memory that holds ``around``, ``offset`` elements off 16 bytes."""
    memory = tensor.new_full((tensor.numel() + 128,), around)
    view = memory[64 + offset : 64 + offset + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


class Emulated:
    """The operators of ``reference``, computed by the kernels.

    offset, stride_offset: elements by which matrices and vectors lie off 16 bytes, and rows of matrices; where ``only``
    is given, those of this name. chunk: rows of a chunk where there are adapters.
    """

    def __init__(self, offset: int = 0, stride_offset: int = 0, only: str | None = None, chunk: int = 4) -> None:
        self.offset = offset
        self.stride_offset = stride_offset
        self.only = only
        self.chunk = chunk

    def _matrix(self, name: str, tensor: Tensor | None, around: float = NAN) -> Tensor | None:
        if tensor is None:
            return None
        offsets = (self.offset, self.stride_offset) if self.only in (None, name) else (0, 0)
        return between(tensor, *offsets, around)

    def _vector(self, name: str, tensor: Tensor | None, around: float = NAN) -> Tensor | None:
        return None if tensor is None else dense(tensor, self.offset if self.only in (None, name) else 0, around)

    def _result(self, name: str, like: Tensor, cols: int) -> Tensor:
        result = self._matrix(name, like.new_full((like.shape[0], cols), NAN), UNTOUCHED)
        assert result is not None
        return result

    def _workspace(self, function: str, args: ctypes.Structure) -> Tensor:
        size = getattr(library(), f"ia3_cuda_{function}_workspace")(ctypes.byref(args))
        memory = torch.full((size + 32,), 0xFF, dtype=torch.uint8)
        skip = -memory.data_ptr() % 16
        args.workspace = memory.data_ptr() + skip
        self._guard = (memory, skip + size)
        return memory

    def _check_workspace(self) -> None:
        memory, end = self._guard
        assert bool((memory[end:] == 0xFF).all()), "the kernel wrote behind its workspace"

    # --- activations ---

    def gated_activation(
        self,
        gate: Tensor,
        up: Tensor | None,
        scale: Tensor | None = None,
        activation: str = "silu",
        index: Tensor | None = None,
    ) -> Tensor:
        g, u, s = self._matrix("gate", gate), self._matrix("up", up), self._vector("scale", scale)
        out = self._result("out", gate, gate.shape[1])
        args = activation_args(g, u, s, activation, index, out)
        call("activation", args)
        assert intact(out)
        return out

    def scaled_activation(
        self, x: Tensor, scale: Tensor | None = None, activation: str = "silu", index: Tensor | None = None
    ) -> Tensor:
        return self.gated_activation(x, None, scale, activation, index)

    def gated_activation_backward(
        self,
        grad: Tensor,
        gate: Tensor,
        up: Tensor | None,
        scale: Tensor | None,
        activation: str,
        index: Tensor | None,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = gate.shape
        dh, g, u = self._matrix("grad", grad), self._matrix("gate", gate), self._matrix("up", up)
        s = self._vector("scale", scale)
        assert dh is not None
        assert g is not None
        blank = torch.full_like(gate, NAN)
        grad_gate = self._vector("grad_gate", blank if output_mask[0] else None, UNTOUCHED)
        grad_up = self._vector("grad_up", blank if output_mask[1] and up is not None else None, UNTOUCHED)
        sums = torch.full_like(scale, NAN) if output_mask[2] and scale is not None else None
        grad_scale = self._vector("grad_scale", sums, UNTOUCHED)
        args = BackwardArgs(
            DTYPES.index(gate.dtype), ACTIVATIONS.index(activation), rows, cols, _pointer(dh), dh.stride(0), _pointer(g)
        )
        args.gate_stride = g.stride(0)
        args.up, args.up_stride = _pointer(u), 0 if u is None else u.stride(0)
        args.scale = _scale(s, None)
        keep: list[Any] = []
        if index is not None and scale is not None:
            plan = chunks_by_adapter(index, scale.shape[0], self.chunk)
            keep = [plan.order.int(), *plan[1:]]
            args.chunks = ctypes.pointer(Chunks(*map(_pointer, keep), plan.first.numel()))
            args.scale.adapters = scale.shape[0]
        args.grad_gate, args.grad_up, args.grad_scale = map(_pointer, (grad_gate, grad_up, grad_scale))
        workspace = self._workspace("activation_backward", args)
        call("activation_backward", args)
        self._check_workspace()
        del workspace
        nothing = gate.new_empty(0)
        for result in (grad_gate, grad_up, grad_scale):
            assert result is None or intact(result)
        return (
            nothing if grad_gate is None else grad_gate,
            nothing if grad_up is None else grad_up,
            grad_scale if grad_scale is not None else nothing if scale is None else scale.new_empty(0),
        )

    def scaled_activation_backward(
        self,
        grad: Tensor,
        x: Tensor,
        scale: Tensor | None,
        activation: str,
        index: Tensor | None,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        wants_x, wants_scale = output_mask
        grad_x, _, grad_scale = self.gated_activation_backward(
            grad, x, None, scale, activation, index, (wants_x, False, wants_scale)
        )
        return grad_x, grad_scale

    # --- one input for two layers ---

    def scale_pair(self, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        given = self._matrix("x", x)
        assert given is not None
        scales = [self._vector("first", first), self._vector("second", second)]
        a, b = (self._vector(name, torch.full_like(x, NAN), UNTOUCHED) for name in ("a", "b"))
        assert a is not None
        assert b is not None
        args = ScalePairArgs(DTYPES.index(x.dtype), *x.shape, _pointer(given), given.stride(0))
        args.scales, args.out = _pointers(scales), _pointers((a, b))
        call("scale_pair", args)
        assert intact(a)
        assert intact(b)
        return a, b

    def scale_pair_backward(
        self,
        grad_first: Tensor,
        grad_second: Tensor,
        x: Tensor,
        first: Tensor,
        second: Tensor,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_x, *wants_scales = output_mask
        # What no result needs is not given.
        da = self._matrix("grad_first", grad_first if wants_x or wants_scales[0] else None)
        db = self._matrix("grad_second", grad_second if wants_x or wants_scales[1] else None)
        given = self._matrix("x", x if any(wants_scales) else None)
        scales = [self._vector("first", first), self._vector("second", second)] if wants_x else [None, None]
        grad_x = self._vector("grad_x", torch.full_like(x, NAN) if wants_x else None, UNTOUCHED)
        sums = [
            self._vector(f"grad_{name}", torch.full_like(scale, NAN) if wanted else None, UNTOUCHED)
            for name, scale, wanted in zip(("first", "second"), (first, second), wants_scales, strict=True)
        ]
        args = ScalePairBackwardArgs(DTYPES.index(x.dtype), *x.shape, _pointers((da, db)))
        args.grad_strides = (ctypes.c_int64 * 2)(*(0 if grad is None else grad.stride(0) for grad in (da, db)))
        args.x, args.x_stride = _pointer(given), 0 if given is None else given.stride(0)
        args.scales, args.grad_x, args.grad_scales = _pointers(scales), _pointer(grad_x), _pointers(sums)
        workspace = self._workspace("scale_pair_backward", args)
        call("scale_pair_backward", args)
        self._check_workspace()
        del workspace
        results = []
        for result, like in ((grad_x, x), (sums[0], first), (sums[1], second)):
            assert result is None or intact(result)
            results.append(like.new_empty(0) if result is None else result)
        dx, ds_first, ds_second = results
        return dx, ds_first, ds_second

    # --- weights ---

    def scaled_weight(self, weight: Tensor, scale: Tensor, dim: int) -> Tensor:
        """A copy of the weight after scale_weight_."""
        w, s = self._matrix("weight", weight, UNTOUCHED), self._vector("scale", scale)
        assert w is not None
        args = ScaleWeightArgs(DTYPES.index(weight.dtype), *weight.shape, _pointer(w), w.stride(0))
        if dim == 0:
            args.row_scale = _pointer(s)
        else:
            args.col_scale = _pointer(s)
        call("scale_weight", args)
        assert intact(w)
        return w


def activation_args(
    gate: Tensor | None, up: Tensor | None, scale: Tensor | None, activation: str, index: Tensor | None, out: Tensor
) -> ActivationArgs:
    assert gate is not None
    args = ActivationArgs(DTYPES.index(gate.dtype), ACTIVATIONS.index(activation), *gate.shape)
    args.gate, args.gate_stride = _pointer(gate), gate.stride(0)
    args.up, args.up_stride = _pointer(up), 0 if up is None else up.stride(0)
    args.scale = _scale(scale, index if scale is not None else None)
    args.out, args.out_stride = _pointer(out), out.stride(0)
    return args
