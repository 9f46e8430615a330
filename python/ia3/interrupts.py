"""Ctrl-C between steps that belong together, never inside one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Let SIGINT wait within the block; the function that it yields lets a waiting one through, and so does its end.

    Python raises ``KeyboardInterrupt`` between any two instructions: after a weight is scaled in place, and before what
    undoes that is noted. Threads other than the main one are never interrupted, and have nothing to hold back.
    """
    previous: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield lambda: None
        return
    waiting: list[tuple[Any, ...]] = []

    def deliver() -> None:
        if waiting:
            arguments = waiting.pop()
            waiting.clear()
            previous(*arguments)

    signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, previous)
    deliver()
