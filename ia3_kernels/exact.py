"""Merging a vector into a weight where it lies, and taking it out again bit-exactly.

A residual of one bit a weight is what exact undoing needs: ``w' = round(w l)`` sends at most two weights, neighbours
among the bit patterns, to one value, and the lowest bit of ``w`` tells them apart. Weights for which that is not enough
(subnormal or infinite results, ``l = 0``) are found while merging, and kept. See ``docs/exact-merging.md``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .moves import Move, move_each
from .schemas import check_dim, check_residual, check_weight_scale, refuse_tangents

_ops: Any = torch.ops.ia3
_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class Residual:
    """What :func:`unmerge_` needs to restore a weight; its three tensors are all there is to store.

    parity: uint8 ``[rows, ceil(cols / 8)]``, the lowest bit of every weight of the matrix as it lies in memory; bit i
        of byte j is column 8 j + i. A one-dimensional weight is one row, a convolution's is ``[out, in * spatial]``.
    positions: int64 ``[E]``, ascending, ``row * cols + column`` of the weights that their parity cannot restore.
    bits: int16, int32 or int64 ``[E]``, the bit patterns of those weights.
    """

    parity: Tensor
    positions: Tensor
    bits: Tensor

    @property
    def nbytes(self) -> int:
        """Return the size of all three, in bytes."""
        return sum(tensor.numel() * tensor.itemsize for tensor in (self.parity, self.positions, self.bits))

    def to(self, device: torch.device | str) -> Residual:
        """Return the same on another device."""
        return Residual(self.parity.to(device), self.positions.to(device), self.bits.to(device))


class Change(NamedTuple):
    """What :func:`change_` does to a weight: ``old_scale`` out, ``new_scale`` in; None is no scale.

    weight, scales, dim: as of :func:`merge_`. residual: what merging ``old_scale`` has returned; None without one.
    """

    weight: Tensor
    old_scale: Tensor | None
    new_scale: Tensor | None
    dim: int = 0
    residual: Residual | None = None


def change_(changes: Sequence[Change], done: list[Any] | None = None) -> list[Residual | None]:
    """Merge, unmerge and swap the scales of many weights, bit-exactly: all of them, or after an exception none.

    As :func:`merge_` with ``exact=True``, :func:`unmerge_` and :func:`swap_`, one after the other; but for weights of
    one GPU that stand together it is waited once, and once more where old scales left positions to be checked.

    Args:
        changes: the weights, each of them once.
        done: an empty list, for callers who undo what an interrupt (``KeyboardInterrupt``) cuts short. If it holds
            something afterwards, the weights have changed, and :func:`undo_` takes them back.

    Returns:
        What undoes each: None where there is no new scale.

    Raises:
        RuntimeError: a shape, dtype, device or layout does not fit, or ``done`` is not empty; nothing was written.
        Whatever is raised, every weight is as it was.
    """
    if done:
        raise RuntimeError("change_: done holds something already; expected an empty list, a new one for each call.")
    moves = [_move_of(change) for change in changes]
    return _change([] if done is None else done, moves)


def undo_(changes: Sequence[Change], done: Sequence[Any]) -> list[Residual | None]:
    """Take back what :func:`change_` has done, by its ``done``, which is worth nothing after that.

    Returns what undoes each old scale; raises as :func:`change_` does.
    """
    moves = [_move_of(change).back(result) for change, result in zip(changes, done, strict=True)]
    return _change([], moves[::-1])[::-1]


def _change(done: list[Any], moves: Sequence[Move]) -> list[Residual | None]:
    """Run what runs the weights' operators, device by device; ``done`` gets what they return."""
    is_direct = _is_direct(*itertools.chain.from_iterable(move.arguments for move in moves))
    try:
        _go(moves, is_direct, done)
        if is_direct:  # the dispatcher would have counted the writes
            torch.autograd.graph.increment_version([move.weight for move in moves if not move.weight.is_inference()])
    except BaseException:
        back = [move.back(result) for move, result in zip(moves, done, strict=False)]
        done.clear()
        _go(back[::-1], is_direct, [])
        raise
    return [_residual_of(move, result) for move, result in zip(moves, done, strict=True)]


def _residual_of(move: Move, result: Any) -> Residual | None:
    tensors = move.left(result)
    return Residual(*tensors) if tensors else None


def merge_(weight: Tensor, scale: Tensor, dim: int = 0, *, exact: bool = False, safe: bool = False) -> Residual | None:
    """Scale a weight in place along its outputs (``dim=0``) or inputs (``dim=1``): ``w ← round(w ∘ scale)``.

    Args:
        weight: ``[out]``, ``[out, in]`` or a convolution's ``[out, in / groups, *spatial]``; fp32, bf16, fp16 (fp64 in
            the reference). A transposed view is taken as it lies.
        scale: ``[out]`` or ``[in]`` (also ``[n, 1]`` and ``[1, n]``), any floating dtype, computed with in fp32; any
            value. It may not share memory with the weight.
        dim: 0 or 1. A convolution's groups follow from the length of an input scale.
        exact: return what :func:`unmerge_` needs, one bit a weight and ten bytes for each one that needs more.
        safe: raise where a result would not be finite; found in one reading pass, before anything is written.

    Returns:
        The residual, or None unless ``exact``. No temporary of the weight's size is made.

    Raises:
        RuntimeError: a shape, dtype, device or layout does not fit.
        ValueError: ``safe``, and a result would not be finite.
        Whatever is raised, the weight is as it was.
    """
    matrix, factors, along = _matrix("merge_", "scale", weight, scale, dim)
    if safe and not bool(_finite(matrix, factors, along)):
        raise ValueError(
            f"merge_: the scaled weight would not be finite in {str(weight.dtype).removeprefix('torch.')}; correct the "
            "scale, or merge without safe: nothing was written."
        )
    if exact:
        return _change([], [Move(matrix, None, factors, along)])[0]
    if along == 0:
        _ops.scale_weight_(matrix, factors, 0)
    else:
        for part, factor in zip(matrix.unflatten(0, (len(factors), -1)), factors, strict=True):
            _ops.scale_weight_(part, factor, 1)
    return None


def unmerge_(weight: Tensor, scale: Tensor, dim: int = 0, residual: Residual | None = None) -> None:
    """Take ``scale`` out of a weight that :func:`merge_` put it into: every bit comes back.

    ``weight``, ``scale`` and ``dim`` are those of the exact merge, with the same values; ``residual`` is its result.

    Raises:
        RuntimeError: a shape, dtype, device or layout does not fit; the weight is as it was.
    """
    change_([Change(weight, scale, None, dim, residual)])


def swap_(
    weight: Tensor, old_scale: Tensor, new_scale: Tensor, dim: int = 0, residual: Residual | None = None
) -> Residual:
    """Go from one merged scale to another, in one pass over the weight.

    The result is that of :func:`unmerge_` with ``old_scale`` and an exact :func:`merge_` of ``new_scale``, bit-exactly.
    The parity is the same for every scale, and is shared between the two residuals.

    Raises:
        RuntimeError: a shape, dtype, device or layout does not fit; the weight is as it was.
    """
    (found,) = change_([Change(weight, old_scale, new_scale, dim, residual)])
    assert found is not None
    return found


def stays_finite(weight: Tensor, scale: Tensor, dim: int = 0) -> bool:
    """Return whether :func:`merge_` would give finite values only; one reading pass, its arguments, its errors."""
    return bool(_finite(*_matrix("stays_finite", "scale", weight, scale, dim)))


def stay_finite(cases: Sequence[tuple[Tensor, Tensor, int]]) -> list[bool]:
    """Return what :func:`stays_finite` does of each weight, scale and dim; a GPU is waited for once."""
    found = [_finite(*_matrix("stays_finite", "scale", *case)) for case in cases]
    answers = {
        device: iter(torch.stack([tensor for tensor in found if tensor.device == device]).tolist())
        for device in {tensor.device for tensor in found}
    }
    return [next(answers[tensor.device]) for tensor in found]


def _finite(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
    operator: Any = _ops.stays_finite
    if _is_direct(weight, scale, dim):
        operator = backends.choose("stays_finite", weight.device.type, weight.dtype)[0].operators["stays_finite"]
    finite: Tensor = operator(weight, scale, dim)
    return finite


def _move_of(change: Change) -> Move:
    """Return a change with its weight as a matrix; raises a sentence for what does not fit."""
    weight, old, new, dim, residual = change
    if old is None and new is None:
        raise RuntimeError("change_: neither an old scale nor a new one is given; give one of them, or both.")
    if old is None and residual is not None:
        raise RuntimeError("change_: a residual is given without the old scale that left it; give both, or neither.")
    matrix, along = weight, dim
    tensors: tuple[Tensor, ...] = ()
    if new is not None:
        op, name = ("merge_", "scale") if old is None else ("swap_", "new_scale")
        matrix, new, along = _matrix(op, name, weight, new, dim)
    if old is not None:
        op, name = ("unmerge_", "scale") if new is None else ("swap_", "old_scale")
        matrix, old, along = _matrix(op, name, weight, old, dim)
        tensors = _tensors(op, matrix, residual)
    if along == 1 and old is not None and new is not None and len(old) != len(new):  # a convolution's groups
        groups = math.lcm(len(old), len(new))
        old, new = (scale.repeat_interleave(groups // len(scale), 0) for scale in (old, new))
    return Move(matrix, old, new, along, tensors)


def _go(moves: Sequence[Move], is_direct: bool, done: list[Any]) -> None:
    if not is_direct:
        move_each(lambda op: getattr(_ops, op).default._op, moves, done)
        return
    for (backend, _), part in itertools.groupby(moves, _runner):
        if backend.moves is None:
            move_each(backend.operators.__getitem__, list(part), done)
        else:
            backend.moves(list(part), done)


def _runner(move: Move) -> tuple[backends.Backend, torch.device]:
    return backends.choose(move.operator, move.weight.device.type, move.weight.dtype)[0], move.weight.device


def _is_direct(*arguments: Any) -> bool:
    """Return whether all there is to calling an operator with these arguments is running its kernel.

    Neither a mode nor a subclass nor a trace has a say then, and the backend is called itself: the dispatcher takes
    longer than a small weight does.
    """
    return (
        not torch.compiler.is_compiling()
        and {Tensor, int}.issuperset(map(type, arguments))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _tensors(op: str, weight: Tensor, residual: Residual | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors of a residual, which lies where the weight does and fits it."""
    if not isinstance(residual, Residual):
        raise RuntimeError(f"{op}: residual is {residual}; expected what merge_ returns with exact=True.")
    tensors = parity, positions, bits = residual.parity, residual.positions, residual.bits
    if not parity.device == positions.device == bits.device == weight.device:
        raise RuntimeError(f"{op}: residual is on {parity.device}, but weight is on {weight.device}; move one of them.")
    check_residual(op, weight, *tensors)
    return tensors


def _matrix(op: str, name: str, weight: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, Tensor, int]:
    """Return the weight as a matrix whose rows lie together in memory, uncopied, the factors and what they are for.

    These are factors of rows ``[rows]``, with 0, or of columns ``[groups, cols]``, with 1.
    """
    if _is_plain(weight, scale, dim):
        return weight.detach(), scale.detach() if dim == 0 else scale.detach()[None], dim
    check_dim(op, weight, dim)
    torch._check(
        weight.device.type != "meta",
        lambda: f"{op}: weight is on the meta device, which holds no values; load it first.",
    )
    for given, tensor in (("weight", weight), (name, scale)):
        torch._check(
            not any(hasattr(tensor, attribute) for attribute in ("to_local", "local_shards")),
            lambda given=given, tensor=tensor: (
                f"{op}: {given} is a {type(tensor).__name__}, of which this process holds a shard; merge before the "
                "model is sharded, or give the shards that are here."
            ),
        )
    torch._check(
        not (weight.is_cuda and torch.cuda.is_current_stream_capturing()),
        lambda: f"{op}: a CUDA graph is being captured, and each replay would scale the weight again; merge before it.",
    )
    is_convolution, features = weight.dim() > 2, weight.shape[dim]
    # An input scale has the channels of all groups, a convolution's weight those of one.
    groups = scale.numel() // features if is_convolution and dim == 1 and features else 1
    check_weight_scale(op, name, scale, weight, dim, groups)
    refuse_tangents(op, weight, scale)
    torch._check(
        not _overlap(weight, scale),
        lambda: f"{op}: {name} shares memory with weight, which is written to; clone it first.",
    )
    factors = scale.detach().reshape(-1).to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    matrix, factors, dim = (_convolution if is_convolution else _plain)(op, weight.detach(), factors, dim)
    rows, cols = matrix.shape
    torch._check(
        rows <= 1 or matrix.stride(0) >= cols,
        lambda: f"{op}: the rows of weight overlap in memory (strides {list(matrix.stride())}); copy it first.",
    )
    return matrix, factors, dim


def _is_plain(weight: Tensor, scale: Tensor, dim: int) -> bool:
    """Return whether a weight and a vector are what nearly all are, about which there is nothing to say."""
    return (
        type(weight) in _PLAIN
        and type(scale) in _PLAIN
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and scale.dtype == torch.float32
        and weight.dim() == 2
        and dim in (0, 1)
        and weight.is_contiguous()
        and scale.is_contiguous()
        and scale.shape == weight.shape[dim : dim + 1]
        and weight.device == scale.device
        and (weight.is_cpu or weight.is_cuda)
        and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
        and not torch._C._overlaps(weight, scale)
        and forward_ad._current_level < 0
    )


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Return whether the bytes between a tensor's first and last element meet those of another."""
    if not first.numel() or not second.numel() or not torch._C._overlaps(first, second):  # share no storage
        return False
    (begin, end), (other_begin, other_end) = (
        (
            t.data_ptr(),
            t.data_ptr() + t.itemsize * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))),
        )
        for t in (first, second)
    )
    return begin < other_end and other_begin < end


def _plain(op: str, weight: Tensor, factors: Tensor, dim: int) -> tuple[Tensor, Tensor, int]:
    if weight.dim() == 1:  # one row, or where it is strided one column
        return (weight[None], factors[None], 1) if weight.stride(0) == 1 else (weight[:, None], factors, 0)
    rows, cols = weight.shape
    if weight.stride(1) != 1 and cols > 1:
        torch._check(
            weight.stride(0) == 1 or rows <= 1,
            lambda: (
                f"{op}: weight has strides {list(weight.stride())}; expected adjacent rows or columns: copy it first."
            ),
        )
        weight, dim = weight.t(), 1 - dim
    return weight, factors if dim == 0 else factors[None], dim


def _convolution(op: str, weight: Tensor, factors: Tensor, dim: int) -> tuple[Tensor, Tensor, int]:
    """Return rows of output channels and columns of inputs and spatial positions, in the order of memory."""
    out, inputs = weight.shape[:2]
    positions = weight[0, 0].numel() if weight.numel() else 0
    is_channels_last = not weight[:1].is_contiguous() and weight[:1].movedim(1, -1).is_contiguous()
    torch._check(
        is_channels_last or weight[:1].is_contiguous(),
        lambda: f"{op}: weight has strides {list(weight.stride())}; expected a contiguous or channels_last weight.",
    )
    matrix = (weight.movedim(1, -1) if is_channels_last else weight).view(out, inputs * positions)
    if dim == 0:
        return matrix, factors, 0
    per_group = factors.view(-1, 1, inputs) if is_channels_last else factors.view(-1, inputs, 1)
    expanded = per_group.expand(-1, positions, -1) if is_channels_last else per_group.expand(-1, -1, positions)
    return matrix, expanded.reshape(len(per_group), -1), 1
