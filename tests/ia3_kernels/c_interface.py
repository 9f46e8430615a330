"""The structures and numbers of ``csrc/include/ia3_kernels.h``, for tests that call it through ctypes."""

from __future__ import annotations

import ctypes

OK, INVALID, UNSUPPORTED, CUDA_ERROR = range(4)
FLOAT32, BFLOAT16, FLOAT16 = range(3)


class Scale(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_void_p), ("index", ctypes.c_void_p), ("adapters", ctypes.c_int32)]


class ActivationArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("gate", ctypes.c_void_p),
        ("gate_stride", ctypes.c_int64),
        ("up", ctypes.c_void_p),
        ("up_stride", ctypes.c_int64),
        ("scale", Scale),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
    ]


class Chunks(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("order", "first", "last", "adapter", "adapter_first", "adapter_last")),
        ("chunks", ctypes.c_int64),
    ]


class BackwardArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("grad", ctypes.c_void_p),
        ("grad_stride", ctypes.c_int64),
        ("gate", ctypes.c_void_p),
        ("gate_stride", ctypes.c_int64),
        ("up", ctypes.c_void_p),
        ("up_stride", ctypes.c_int64),
        ("scale", Scale),
        ("chunks", ctypes.POINTER(Chunks)),
        ("grad_gate", ctypes.c_void_p),
        ("grad_up", ctypes.c_void_p),
        ("grad_scale", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    ]


class ScalePairArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("scales", ctypes.c_void_p * 2),
        ("out", ctypes.c_void_p * 2),
    ]


class ScalePairBackwardArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("grads", ctypes.c_void_p * 2),
        ("grad_strides", ctypes.c_int64 * 2),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("scales", ctypes.c_void_p * 2),
        ("grad_x", ctypes.c_void_p),
        ("grad_scales", ctypes.c_void_p * 2),
        ("workspace", ctypes.c_void_p),
    ]


class ScaleWeightArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        ("row_scale", ctypes.c_void_p),
        ("col_scale", ctypes.c_void_p),
    ]


MOVE, COLLECT, TAKE_BACK, CHECK = range(4)  # ia3_exact_mode


class ExactScaleArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("mode", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        ("old_scale", ctypes.c_void_p),
        ("new_scale", ctypes.c_void_p),
        ("scales_rows", ctypes.c_int),
        ("rows_per_group", ctypes.c_int64),
        ("parity", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("escapes", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("new_positions", ctypes.c_void_p),
        ("new_bits", ctypes.c_void_p),
    ]


class HopperLinearArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        ("tile", ctypes.c_int),
    ]
