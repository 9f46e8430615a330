"""(IA)³ for transformers models, at no cost: PEFT's interface over the kernels of ``ia3_kernels``."""

from __future__ import annotations

from importlib import metadata

from .config import IA3Config, PeftType, TaskType
from .errors import IA3Error
from .model import IA3Model, get_peft_model
from .report import Report, ReportRow, report

PeftModel = IA3Model

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

try:
    __version__ = metadata.version("ia3-kernels")
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
