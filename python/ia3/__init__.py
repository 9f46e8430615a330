"""(IA)³ for transformers models, at no cost: PEFT's interface over the kernels of ``ia3_kernels``.

Names are imported when they are first used: the command line answers ``--help`` without waiting for torch, and sets the
environment before transformers reads it.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration import accelerate, decelerate
    from .auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .bank import AdapterBank, BankReport
    from .config import IA3Config, PeftType, TaskType
    from .config import IA3Config as PeftConfig
    from .errors import IA3Error
    from .kbit import prepare_model_for_kbit_training
    from .model import (
        IA3Model,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        set_peft_model_state_dict,
    )
    from .model import IA3Model as PeftModel
    from .model import IA3Model as PeftModelForCausalLM
    from .model import IA3Model as PeftModelForFeatureExtraction
    from .model import IA3Model as PeftModelForQuestionAnswering
    from .model import IA3Model as PeftModelForSeq2SeqLM
    from .model import IA3Model as PeftModelForSequenceClassification
    from .model import IA3Model as PeftModelForTokenClassification
    from .reporting import Report, ReportRow, report
    from .status import get_layer_status, get_model_status

__all__ = [
    "AdapterBank",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BankReport",
    "IA3Config",
    "IA3Error",
    "IA3Model",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "Report",
    "ReportRow",
    "TaskType",
    "accelerate",
    "decelerate",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "report",
    "set_peft_model_state_dict",
]

# Where names live that their own module's name does not tell: one model and one configuration serve every task.
_ALIASES = {"PeftConfig": "IA3Config", "PeftModel": "IA3Model"}
_HOMES = {
    **dict.fromkeys(("accelerate", "decelerate"), "acceleration"),
    **dict.fromkeys(("AdapterBank", "BankReport"), "bank"),
    **dict.fromkeys(("IA3Config", "PeftType", "TaskType"), "config"),
    **dict.fromkeys(("get_layer_status", "get_model_status"), "status"),
    **dict.fromkeys(("Report", "ReportRow", "report"), "reporting"),
    "IA3Error": "errors",
    "prepare_model_for_kbit_training": "kbit",
}

try:
    __version__ = metadata.version("ia3-kernels")
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attribute = "IA3Model" if name.startswith("PeftModelFor") else _ALIASES.get(name, name)
    home = _HOMES.get(attribute, "auto" if attribute.startswith("Auto") else "model")
    value = getattr(importlib.import_module(f".{home}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
