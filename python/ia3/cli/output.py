"""Where `-o` may lead: checked before the work, and never through a link that somebody else laid."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import IA3Error


def check_parent(path: Path) -> None:
    """Raise IA3Error if nothing can be made at `path`, because of the folders on its way."""
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise IA3Error(f"the output {path} cannot be made: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise IA3Error(f"the output {path} cannot be made: {parent} may not be written to.")


def follow(path: Path) -> Path:
    """Return where a link leads, or `path` itself. Raises IA3Error for somebody else's link.

    A link in a folder where everybody may write (`/tmp`) counts only if it is the user's or the folder owner's: Linux's
    own rule, kept where Linux was told not to.
    """
    if not path.is_symlink():
        return path
    folder, link = path.absolute().parent.stat(), path.lstat()
    if folder.st_mode & stat.S_IWOTH and link.st_uid not in (os.geteuid(), folder.st_uid):
        raise IA3Error(f"the output {path} is a link that somebody else made; choose another name.")
    return path.resolve()


def check_file(path: Path) -> Path:
    """Return where a file at `path` is to be written: there, or where the user's own link leads. Raises IA3Error."""
    path = follow(path)
    if path.is_dir():
        raise IA3Error(f"the output {path} is a folder; name a file.")
    if not path.exists() or path.is_file():
        check_parent(path)
    elif not os.access(path, os.W_OK):
        raise IA3Error(f"the output {path} may not be written to; name another file.")
    return path


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
            file = file or (sys.stdout.buffer if path is None else _open(check_file(path)))
            file.write(line)
            file.flush()
        except OSError as error:
            raise IA3Error(f"{path or 'stdout'} could not take the answers: {error.strerror}.") from error

    try:
        yield write
    finally:
        with nullcontext() if file is None or path is None else file:
            pass


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        return path.open("wb", buffering=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A new file of a random name, made by us alone, takes the place of what stood there; nothing is followed.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(descriptor, 0o666 & ~mask)  # mkstemp makes files for the owner alone
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
    return os.fdopen(descriptor, "wb")
