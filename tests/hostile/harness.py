"""Attacks within bounds of seconds and bytes, and what must come of them: a sentence, and nothing changed.

Seconds are the processor's, for CI shares its cores; what waits for ever instead ends the process, with a traceback.
Bytes are of address space, which the system refuses beyond the bound.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import re
import resource
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ia3 import IA3Error

SECONDS, BYTES = 2.0, 512 << 20
# Of waiting, where there should be none: a busy machine takes many times its processor's seconds.
_PATIENCE = 60


@contextmanager
def bounds(seconds: float = SECONDS, nbytes: int = BYTES) -> Iterator[None]:
    """Fail a block that takes longer, or more memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    faulthandler.dump_traceback_later(_PATIENCE, exit=True, file=sys.__stderr__)
    resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, hard))
    start = time.process_time()
    try:
        yield
    finally:
        spent = time.process_time() - start
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
    assert spent <= seconds, f"{spent:.1f} s"


def refused(
    attack: Callable[[], object],
    said: str,
    seconds: float = SECONDS,
    nbytes: int = BYTES,
    kind: type[Exception] = IA3Error,
) -> None:
    """Make an attack, which must raise ``kind`` with a sentence in which the regular expression ``said`` is found."""
    with bounds(seconds, nbytes), pytest.raises(Exception) as caught:  # noqa: PT011  (of another kind fails below)
        attack()
    assert isinstance(caught.value, kind), f"{type(caught.value).__name__}: {caught.value}"
    check_sentence(str(caught.value), said)


def check_sentence(sentence: str, said: str) -> None:
    """Fail for what is no sentence, goes on for ever, may not go to a terminal, or lacks ``said``."""
    assert re.search(said, sentence), f"{said!r} is not in {sentence[:1000]!r}"
    assert len(sentence) <= 2100
    assert sentence.isprintable(), repr(sentence)
    assert sentence.rstrip("'\"").endswith((".", "!")), sentence[-100:]


def tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return what a folder holds, by which two states of it can be compared; nothing is followed or waited for."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        what: object = None
        if stat.S_ISLNK(mode):
            what = os.readlink(path)
        elif stat.S_ISREG(mode) and path.lstat().st_size < 1 << 24:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = (mode, what)
    return found


# --- what lies where a file should ------------------------------------------------------------------------------------


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _cycle(path: Path) -> None:
    path.symlink_to(path.with_name("other end"))
    path.with_name("other end").symlink_to(path)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 42)


# Name -> what makes it at a path
NO_FILES: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "device": _device,
    "nothing": lambda path: path.symlink_to("/dev/null"),
    "dangling": lambda path: path.symlink_to("there is none"),
    "cycle": _cycle,
    "sparse": _sparse,
}


def put(place: Path, make: Callable[[Path], object]) -> None:
    """Make something where a file may be."""
    place.unlink(missing_ok=True)
    make(place)
