"""(IA)³ for transformers models, at no cost: PEFT's models over the kernels of ``ia3_kernels``.

Names are imported when they are first used: the command line answers ``--help`` without waiting for torch, and sets the
environment before transformers reads it.
"""

# ruff: noqa: F401  (the imports below are for type checkers; the names are in __all__)
from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import (
        PeftConfig,
        PeftType,
        TaskType,
        get_layer_status,
        get_model_status,
        get_peft_model_state_dict,
        prepare_model_for_kbit_training,
        set_peft_model_state_dict,
    )

    from .acceleration import accelerate, decelerate, inject_adapter_in_model
    from .bank import (
        AdapterBank,
        BankReport,
    )
    from .config import IA3Config
    from .errors import IA3Error
    from .model import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from .reporting import (
        Report,
        ReportRow,
        report,
    )
    from .tuner import IA3Model

# Where each name is found; what PEFT has stays PEFT's. A tuner alone would not know its layers.
_NAMES = {
    "peft": "PeftConfig PeftType TaskType get_layer_status get_model_status get_peft_model_state_dict "
    "prepare_model_for_kbit_training set_peft_model_state_dict",
    ".acceleration": "IA3Model accelerate decelerate inject_adapter_in_model",
    ".bank": "AdapterBank BankReport",
    ".config": "IA3Config",
    ".errors": "IA3Error",
    ".model": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
    "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
    "AutoPeftModelForTokenClassification PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction "
    "PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
    "PeftModelForTokenClassification get_peft_model",
    ".reporting": "Report ReportRow report",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)

try:
    __version__ = metadata.version("ia3-kernels")
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
