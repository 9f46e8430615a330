"""Where a saved adapter lies: a local folder, or a repository of a model hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from .errors import IA3Error

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
    """The local folder of a saved adapter: the one that ``model_id`` names, or a download from a model hub.

    Further arguments that PEFT takes have no effect. Raises :class:`IA3Error`.
    """
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
