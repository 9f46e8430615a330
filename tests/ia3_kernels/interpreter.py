"""Triton's interpreter, fit for tests: it checks every address, and is several times faster.

Importing this needs Triton. The interpreter reads and writes whatever a kernel's pointers say; here, an address outside
of the kernel's tensors fails the test instead, as compute-sanitizer's memcheck would on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor's elements and the one after the last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _Bounds:
    """The extents of the tensors of the launch that runs."""

    def __init__(self) -> None:
        self.extents: list[tuple[int, int]] = []

    def check(self, pointers: Any, mask: Any, size: int) -> None:
        addresses = pointers[np.asarray(mask, dtype=bool)]
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, end in self.extents:
            inside |= (addresses >= first) & (addresses + size <= end)
        assert inside.all(), f"the kernel touches {addresses[~inside][0]:#x}, which belongs to none of its tensors"


@contextmanager
def checked() -> Iterator[None]:
    """Check addresses, and patch the language once a launch rather than once a call of a device function."""
    bounds = _Bounds()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, prepare = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    patch_language = interpreter._patch_lang
    patched: set[frozenset[str]] = set()  # which modules of the language, during a launch

    def checked_load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        bounds.check(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *args, **kwargs)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        bounds.check(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *args, **kwargs)

    def prepared(self: Any, arguments: Any, keywords: Any) -> Any:
        tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in (*arguments, *keywords.values())]
        bounds.extents = [_extent(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return prepare(self, arguments, keywords)

    def patched_once(function: Any) -> Any:
        modules = (value for value in function.__globals__.values() if isinstance(value, ModuleType))
        names = frozenset(module.__name__ for module in modules if module in (tl, tl.core))
        if names in patched:
            return interpreter._LangPatchScope()
        scope, is_launch = patch_language(function), not patched
        patched.add(names)
        if is_launch:
            restore = scope.restore

            def restored() -> None:
                patched.clear()
                restore()

            scope.restore = restored
        return scope

    copy = torch.UntypedStorage.copy_

    def copied(self: Any, source: Any, *args: Any) -> Any:
        # The interpreter ends a launch by copying each CPU storage to itself, which touches all of its pages.
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(executor, "_init_args_hst", prepared)
        patch.setattr(interpreter, "_patch_lang", patched_once)
        patch.setattr(torch.UntypedStorage, "copy_", copied)
        yield
