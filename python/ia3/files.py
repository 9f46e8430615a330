"""Files that others may have made or may be reading: what is read is bounded, what is written appears whole."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import IA3Error, reason_of

# Bytes. No configuration, index or list of requests comes near; a device or a sparse file goes beyond.
LONGEST_TEXT = 256 << 20
# Layers, experts or heads of a model.
_MOST_PARTS = 10_000


# --- reading ---------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; raises :class:`OSError` for FIFOs and devices, which may have no end."""
    # Not to wait for whoever writes into a FIFO; of no effect on files.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "it is a device or a FIFO, and no file")
    return file


def read_bytes(path: Path, limit: int, advice: str) -> bytes:
    """Return what is in a regular file of at most ``limit`` bytes; raises :class:`IA3Error`, with ``advice``."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise IA3Error(f"{path} has {size:,} bytes, and {limit:,} at most can be read; {advice}.")
            return file.read(size)
    except OSError as error:
        raise IA3Error(f"{path} cannot be read: {error.strerror or error}; {advice}.") from error


def read_json(path: Path, advice: str = "get the file again") -> dict[str, Any]:
    """Return the JSON object in a file; raises :class:`IA3Error`."""
    try:
        content = json.loads(read_bytes(path, LONGEST_TEXT, advice).decode("utf-8"))
    except IA3Error:
        raise
    except RecursionError:
        raise IA3Error(f"{path} cannot be read as JSON (it is nested too deeply); {advice}.") from None
    except ValueError as error:
        raise IA3Error(f"{path} cannot be read as JSON ({reason_of(error)}); {advice}.") from None
    if not isinstance(content, dict):
        raise IA3Error(f"{path} holds a {type(content).__name__}; expected a JSON object: {advice}.")
    return content


def read_model_config(path: Path) -> dict[str, Any]:
    """Return what a model's ``config.json`` holds; raises :class:`IA3Error`, also for more parts than any has."""
    config = read_json(path)
    parts = [config]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]  # a vision tower's, say
        for name, count in part.items():
            is_count = name.endswith(("layers", "layer", "blocks", "heads", "head", "experts", "depth"))
            if is_count and isinstance(count, int | float) and not count <= _MOST_PARTS:
                raise IA3Error(
                    f"{path} has {name:.200} {count!r:.200}; expected {_MOST_PARTS:,} at most: get it again."
                )
    return config


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its sub-folders; raises :class:`IA3Error` for what is neither.

    FIFOs, devices, links that lead nowhere, in a circle or to other folders: a program that opens all of a model's
    files would wait or go on for ever.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted({*folders} - {".git", ".cache"})  # other programs' own
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_file():
                yield path
            elif path.is_symlink() or not path.is_dir():
                raise IA3Error(f"{path} is neither a file nor a folder of the model's own; take it away.")


# --- writing ---------------------------------------------------------------------------------------------------------


def check_parent(path: Path) -> None:
    """Raise IA3Error if nothing can be made at `path`, because of the folders on its way."""
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not os.path.isdir(parent):
        raise IA3Error(f"the output {path} cannot be made: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise IA3Error(f"the output {path} cannot be made: {parent} may not be written to.")


def follow(path: Path) -> Path:
    """Return where a link leads, or `path` itself. Raises IA3Error for somebody else's link.

    A link in a folder where everybody may write (`/tmp`) counts only if it is the user's or the folder owner's: Linux's
    own rule, kept where Linux was told not to.
    """
    if not os.path.islink(path):
        return path
    folder, link = path.absolute().parent.stat(), path.lstat()
    if folder.st_mode & stat.S_IWOTH and link.st_uid not in (os.geteuid(), folder.st_uid):
        raise IA3Error(f"the output {path} is a link that somebody else made; choose another name.")
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
        raise IA3Error(f"the output {path} is a link that leads in a circle; choose another name.") from error


def check_file(path: Path) -> Path:
    """Return where a file at `path` is to be written: there, or where the user's own link leads. Raises IA3Error."""
    path = follow(path)
    if os.path.isdir(path):
        raise IA3Error(f"the output {path} is a folder; name a file.")
    if not os.path.exists(path) or os.path.isfile(path):
        check_parent(path)
    elif not os.access(path, os.W_OK):
        raise IA3Error(f"the output {path} may not be written to; name another file.")
    return path


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder next to ``path`` (so on the same file system), gone at the end.

    What a killed process left there for the same ``path`` is removed, with a warning: a lock, which ends with its
    process, tells it from the folder of one at work. Raises :class:`IA3Error`.
    """
    prefix, scratch = f".{path.name}.ia3.", None
    for left in map(Path, sorted(glob.glob(glob.escape(str(path.parent / prefix)) + "*"))):
        # Nothing is removed on a file system without locks, where nobody can tell, and nothing of other users'.
        with suppress(OSError), open_file(left / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not left.is_symlink() and left.stat().st_uid == os.geteuid():
                _remove(left)
                warnings.warn(f"{left}, which a command that was killed had left behind, is removed.", stacklevel=5)
        with suppress(OSError):
            left.rmdir()  # one without files: killed before it had its lock, or after
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        with open(scratch / "lock", "xb") as lock:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield scratch
    except OSError as error:
        raise IA3Error(f"cannot write {path}: {error.strerror or error}; nothing was changed there.") from error
    finally:
        if scratch is not None:
            _remove(scratch)


def _remove(scratch: Path) -> None:
    try:
        shutil.rmtree(scratch / "content", ignore_errors=True)  # first: without its lock it would be nobody's
    finally:  # after an interrupt, too
        shutil.rmtree(scratch, ignore_errors=True)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to the file ``path``, which appears whole; its folder is made where it is missing.

    Devices and FIFOs are written to. Raises :class:`IA3Error`.
    """
    target, data = check_file(Path(path)), text.encode("utf-8")
    if os.path.exists(target) and not os.path.isfile(target):
        try:
            with open(target, "wb", buffering=0) as device:
                device.write(data)
        except OSError as error:
            raise IA3Error(f"cannot write {target}: {error.strerror}; choose another name.") from error
        return
    with _beside(target) as scratch, open(scratch / "content", "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, target)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], is_new: bool = False) -> Iterator[Path]:
    """Yield a scratch folder whose files appear in ``path`` when the block ends without an exception.

    A folder that does not exist yet appears in one rename. In one that does, each file replaces its namesake in one
    rename and files of other names stay; is_new: then nothing is written. After an exception or an interrupt ``path``
    is as it was. Raises :class:`IA3Error`.
    """
    target = Path(path)
    if os.path.lexists(target) and not os.path.isdir(target):
        raise IA3Error(f"cannot write the folder {target}: a file of that name exists; choose another name.")
    with _beside(target) as scratch:
        content = scratch / "content"
        content.mkdir()
        yield content
        if is_new or not os.path.exists(target):
            os.rename(content, target)  # fails where a file, or a folder with files, came to be there meanwhile
            return
        written, kept = sorted(content.rglob("*")), scratch / "kept"
        places = [target / one.relative_to(content) for one in written]
        for place in places:
            if place.is_symlink() and place.is_dir():
                raise IA3Error(f"{place} is a link to another folder, which nothing is written to; take it away.")
        kept.mkdir()
        undo: list[tuple[Path, Path]] = []
        try:
            for number, (one, place) in enumerate(zip(written, places, strict=True)):
                if one.is_dir():
                    place.mkdir(exist_ok=True)
                    continue
                if os.path.lexists(place):
                    _keep(place, kept / str(number))
                undo.append((place, kept / str(number)))
                os.replace(one, place)
        except BaseException:
            for place, was in undo:
                if os.path.lexists(was):
                    os.replace(was, place)
                else:
                    place.unlink(missing_ok=True)
            raise


def _keep(path: Path, copy: Path) -> None:
    """Let a file lie in a second place, too."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(path, copy, follow_symlinks=False)


# --- finding ---------------------------------------------------------------------------------------------------------

# The files of an adapter that are worth a download; pickles are not.
_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What a model hub calls a repository.
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def source_folder(
    model_id: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **_ignored: Any,
) -> Path:
    """Return the local folder of a saved adapter: the one that ``model_id`` names, or a download from a model hub.

    Further arguments that PEFT takes have no effect. Raises :class:`IA3Error`.
    """
    from huggingface_hub import snapshot_download  # here: the command line writes files without a hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    folder = Path(model_id)
    if not os.path.exists(folder) and _REPOSITORY.fullmatch(str(model_id)):
        inside = f"{subfolder}/" if subfolder else ""
        try:
            folder = Path(
                snapshot_download(
                    str(model_id),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    allow_patterns=[inside + name for name in _FILES],
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise IA3Error(
                f"{str(model_id)!r:.200} is no local folder, and no adapter of that name could be fetched from the hub "
                f"({reason_of(error)}); name the folder of a saved adapter, or a repository that holds one."
            ) from error
    return folder / subfolder if subfolder else folder


@contextmanager
def expecting_no_config(bases: Iterable[str | None]) -> Iterator[None]:
    """Let PEFT not warn in the block that a base which lies here, a GGUF file say, has no config.json beside it."""
    with warnings.catch_warnings():
        for base in bases:
            if base and os.path.exists(base):
                warnings.filterwarnings("ignore", f"Could not find a config file in {re.escape(base)} - ", UserWarning)
        yield
