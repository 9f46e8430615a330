"""``AutoPeftModel…``: a saved adapter in its base model, both loaded in one call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import transformers
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .config import IA3Config, TaskType
from .errors import IA3Error
from .model import IA3Model

# What says where a repository's files come from; the rest of ``from_pretrained``'s arguments is for the base model.
_SOURCE = ("token", "cache_dir")


class AutoPeftModel:
    """Loads adapters of any task; each subclass, those of its task.

    task: whose adapters the class loads.
    loader: transformers' class that loads a base model for it.
    """

    task: ClassVar[TaskType | None] = None
    loader: ClassVar[str] = ""

    def __init__(self) -> None:
        raise IA3Error(
            f"{type(self).__name__} makes no objects of its own; call {type(self).__name__}.from_pretrained."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: IA3Config | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] = ("transformers",),
        subfolder: str | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> IA3Model:
        """Load the base model that a saved adapter names, and put the adapter into it.

        Where a tokenizer with more tokens than the base model knows was saved with the adapter, the base model's
        embeddings are extended to them first.

        pretrained_model_name_or_path, adapter_name, is_trainable, config, subfolder, autocast_adapter_dtype: the
            adapter, as for :meth:`IA3Model.from_pretrained`.
        revision: of the adapter's repository on a model hub; that of the base model is in the adapter's configuration.
        import_allowlist: packages that an adapter without a task may name its base model's class from.
        kwargs: for the base model's ``from_pretrained`` (``dtype``, ``device_map``, ``quantization_config``…);
            ``token`` and ``cache_dir`` are for the adapter too.

        Raises :class:`~ia3.errors.IA3Error`.
        """
        source = {"revision": revision} | {name: kwargs[name] for name in _SOURCE if name in kwargs}
        saved = IA3Config.from_pretrained(pretrained_model_name_or_path, subfolder, **source)
        base = _load_base(cls._loader(saved, import_allowlist), saved, kwargs)
        _extend_embeddings(base, pretrained_model_name_or_path, kwargs.get("trust_remote_code", False), source)
        return IA3Model.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable,
            config,
            autocast_adapter_dtype,
            subfolder=subfolder,
            **source,
        )

    @classmethod
    def _loader(cls, config: IA3Config, import_allowlist: Sequence[str]) -> Any:
        """The class whose ``from_pretrained`` loads the base model."""
        if config.task_type is None and config.auto_mapping is not None:
            return _mapped_class(config.auto_mapping, import_allowlist)
        if config.task_type is None and cls.task is None:
            raise IA3Error(
                "the adapter was saved without a task_type and without an auto_mapping, so the class of its base model "
                "is not known; use the AutoPeftModelFor… class of its task."
            )
        task = TaskType(config.task_type or cls.task)
        kind = next(kind for kind in AutoPeftModel.__subclasses__() if kind.task == task)
        if cls.task not in (None, task):
            raise IA3Error(
                f"the adapter has task_type {task.value!r}, which {cls.__name__} does not load; use {kind.__name__}."
            )
        return getattr(transformers, kind.loader)


def _mapped_class(auto_mapping: dict[str, Any], import_allowlist: Sequence[str]) -> Any:
    """The class that ``auto_mapping`` names. Importing runs code, so only what the caller trusts is."""
    library, name = auto_mapping.get("parent_library"), auto_mapping.get("base_model_class")
    if not any(library == allowed or str(library).startswith(f"{allowed}.") for allowed in import_allowlist):
        raise IA3Error(
            f"the adapter's auto_mapping imports {library!r}, which is not in the import allowlist "
            f"({', '.join(import_allowlist)}); if you trust it, name the package in import_allowlist."
        )
    try:
        found = getattr(importlib.import_module(str(library)), str(name), None)
    except ImportError:
        found = None
    if not hasattr(found, "from_pretrained"):
        raise IA3Error(
            f"the adapter's auto_mapping names {name!r} of {library!r}, which is no model class here; load the base "
            "model yourself and use IA3Model.from_pretrained(model, folder)."
        )
    return found


def _load_base(loader: Any, config: IA3Config, kwargs: dict[str, Any]) -> Any:
    place = config.base_model_name_or_path
    if not place:
        raise IA3Error(
            "the adapter's configuration has no base_model_name_or_path; load the base model yourself and use "
            "IA3Model.from_pretrained(model, folder)."
        )
    try:
        return loader.from_pretrained(place, revision=config.revision, **kwargs)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise IA3Error(
            f"the base model {place!r}, which the adapter names, cannot be loaded ({reason}); load it yourself and use "
            "IA3Model.from_pretrained(model, folder)."
        ) from error


def _extend_embeddings(
    base: Any, adapter: str | os.PathLike[str], trust_remote_code: bool, source: dict[str, Any]
) -> None:
    """Make room for the tokens of a tokenizer that was saved with the adapter; too much room stays."""
    if not hasattr(base, "get_input_embeddings") or not get_tokenizer_config(adapter, **source):
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code, **source)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


def _for(name: str, task: TaskType, loader: str) -> type[AutoPeftModel]:
    return type(f"AutoPeftModelFor{name}", (AutoPeftModel,), {"__module__": __name__, "task": task, "loader": loader})


AutoPeftModelForCausalLM = _for("CausalLM", TaskType.CAUSAL_LM, "AutoModelForCausalLM")
AutoPeftModelForFeatureExtraction = _for("FeatureExtraction", TaskType.FEATURE_EXTRACTION, "AutoModel")
AutoPeftModelForQuestionAnswering = _for("QuestionAnswering", TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering")
AutoPeftModelForSeq2SeqLM = _for("Seq2SeqLM", TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM")
AutoPeftModelForSequenceClassification = _for(
    "SequenceClassification", TaskType.SEQ_CLS, "AutoModelForSequenceClassification"
)
AutoPeftModelForTokenClassification = _for("TokenClassification", TaskType.TOKEN_CLS, "AutoModelForTokenClassification")
