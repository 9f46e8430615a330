"""(IA)³ for transformers models, at no cost: PEFT's interface over the kernels of ``ia3_kernels``.

Names are imported when they are first used: the command line answers ``--help`` without waiting for torch, and sets the
environment before transformers reads it.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import IA3Config, PeftType, TaskType
    from .errors import IA3Error
    from .model import IA3Model, get_peft_model
    from .model import IA3Model as PeftModel
    from .reporting import Report, ReportRow, report

__all__ = [
    "IA3Config",
    "IA3Error",
    "IA3Model",
    "PeftModel",
    "PeftType",
    "Report",
    "ReportRow",
    "TaskType",
    "get_peft_model",
    "report",
]

# name -> the module and the attribute that it stands for
_HOMES = {
    "IA3Config": ("config", "IA3Config"),
    "IA3Error": ("errors", "IA3Error"),
    "IA3Model": ("model", "IA3Model"),
    "PeftModel": ("model", "IA3Model"),  # so that scripts written for PEFT find the class they expect
    "PeftType": ("config", "PeftType"),
    "Report": ("reporting", "Report"),
    "ReportRow": ("reporting", "ReportRow"),
    "TaskType": ("config", "TaskType"),
    "get_peft_model": ("model", "get_peft_model"),
    "report": ("reporting", "report"),
}

try:
    __version__ = metadata.version("ia3-kernels")
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
