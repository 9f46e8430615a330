"""Answers to a file, a device or stdout, line by line."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import IA3Error
from ..files import check_file


@contextmanager
def json_lines(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes an object as a line of UTF-8, at once, to `path` or to stdout.

    The first line replaces a regular file by a new one; devices and FIFOs are written to. Raises IA3Error.
    """
    file: BinaryIO | None = None

    def write(record: dict[str, Any]) -> None:
        nonlocal file
        # Half of a surrogate pair has no UTF-8; as an escape it is JSON all the same.
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            file = file or (sys.stdout.buffer if path is None else opened.enter_context(_open(check_file(path))))
            file.write(line)
            file.flush()
        except OSError as error:
            raise IA3Error(f"{path or 'stdout'} could not take the answers: {error.strerror}.") from error

    with ExitStack() as opened:
        yield write


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        return path.open("wb", buffering=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A new file of a random name, made by this process alone, takes the place of what stood there.
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    file = new.open("xb")
    try:
        os.replace(new, path)
    except OSError:
        file.close()
        new.unlink()
        raise
    return file
