"""Keeps forward passes and what changes the weights apart, in the threads of one process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from .errors import IA3Error


class Gate:
    """Keeps apart, of one model, forward passes of any threads and what changes its weights.

    routes: blocks in which rows of a batch run with adapters of their own, which weights that hold one would spoil.
    disabled: blocks without adapters that are open, and ``enabling`` what ends the last of them.
    """

    def __init__(self) -> None:
        self.routes: set[Any] = set()
        self.disabled, self.enabling = 0, contextlib.ExitStack()
        self._changed = threading.Condition()
        self._readers: dict[int, int] = {}  # how many forward passes each thread is in
        self._writer: int | None = None
        self._depth = 0

    def __reduce__(self) -> Any:
        return Gate, ()  # a copy of the model is another one

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Wait until nobody changes the weights, and let nobody within the block."""
        me = threading.get_ident()
        with self._changed:
            if self._writer is not None:
                self._changed.wait_for(lambda: self._writer in (None, me) or me in self._readers)
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                    self._changed.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Wait for the forward passes of other threads, and let none begin within the block.

        Raises :class:`IA3Error` in the middle of one while another thread waits in the same way: both would for ever.
        """
        me = threading.get_ident()
        with self._changed:
            if me in self._readers and self._writer not in (None, me):
                raise IA3Error("another thread is about to change the model's weights; do so outside of forward.")
            self._changed.wait_for(lambda: self._writer in (None, me))
            self._writer = me
            self._depth += 1
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._readers.keys() <= {me})
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._changed.notify_all()

    @contextlib.contextmanager
    def merging(self) -> Iterator[None]:
        """Do as :meth:`changing`; raises :class:`IA3Error` within a route, or while another thread is in one."""
        with self.changing():
            if self.routes:
                raise IA3Error("rows of a batch are running with adapters of their own; leave the route first.")
            yield
