"""Files: written beside their place and renamed into it, so that no reader sees half of one; and where adapters lie."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import IA3Error


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder next to ``path`` (so on the same file system), gone at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise IA3Error(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written."
        ) from error
    try:
        yield scratch
    except OSError as error:
        raise IA3Error(f"cannot write {path}: {error.strerror or error}; nothing there was replaced.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _with_usual_permissions(path: Path, is_folder: bool) -> Path:
    """Give ``path`` the permissions of a newly made file; ``mkdtemp`` makes folders for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if is_folder else 0o666) & ~mask)
    return path


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to the file ``path``, making its folder where missing; raises :class:`IA3Error`."""
    target = Path(path)
    if target.is_dir():
        raise IA3Error(f"cannot write the file {target}: a folder of that name exists; choose another name.")
    with _beside(target) as scratch:
        written = scratch / target.name
        with open(written, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, target)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to the file ``path``; as :func:`atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch folder whose files appear in ``path`` when the block ends without an exception.

    A folder that does not exist yet appears in one rename. In one that does, each file replaces its namesake in one
    rename and files of other names stay. After an exception ``path`` is as it was. Raises :class:`IA3Error`.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise IA3Error(f"cannot write the folder {target}: a file of that name exists; choose another name.")
    with _beside(target) as scratch:
        content = scratch / "content"
        content.mkdir()
        yield content
        if not target.exists():
            os.replace(_with_usual_permissions(content, is_folder=True), target)
            return
        for written in sorted(content.rglob("*")):
            place = target / written.relative_to(content)
            if written.is_dir():
                place.mkdir(exist_ok=True)
            else:
                os.replace(written, place)


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
    if not folder.exists() and _REPOSITORY.fullmatch(str(model_id)):
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
            reason = str(error).strip().partition("\n")[0]
            raise IA3Error(
                f"{str(model_id)!r} is no local folder, and no adapter of that name could be fetched from the hub "
                f"({reason}); name the folder of a saved adapter, or a repository that holds one."
            ) from error
    return folder / subfolder if subfolder else folder
