"""PEFT's IA3 models with this package's layers: made, loaded and saved.

What differs from PEFT is what computes, what merges, and that files and configurations are checked whole before
anything is changed.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import nn

from . import fused
from .checkpoint import (
    WEIGHTS_NAME,
    check_embeddings_unmerged,
    check_file,
    check_saved,
    expected_tensors,
    plain_name,
    present_tensors,
    readable,
)
from .config import IA3Config
from .errors import IA3Error
from .files import atomic_folder, expecting_no_config, source_folder
from .matching import Plan
from .merging.model import kept
from .peft_layers import injecting, staying
from .planning import check_unadapted, plan_adapter
from .reporting import log_report
from .swap import accelerated_class, all_or_nothing, in_place_of, install
from .tuner import check_name


def _forward_as(theirs: Any) -> Any:
    """Return a ``forward`` with the signature of PEFT's, which Trainer and others read.

    PEFT's own looks up the active adapter's configuration by name, for methods that prepend prompts; a compiled graph
    would hold for that name only.
    """

    signature = inspect.signature(theirs.forward)
    parameters = list(signature.parameters.values())[1:]
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    @functools.wraps(theirs.forward)
    def forward(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if len(args) > 1 and names:  # in PEFT's order, which is not always the model's
            named = dict(zip(names, args, strict=False))
            if len(named) < len(args) or named.keys() & kwargs.keys():
                signature.bind(self, *args, **kwargs)  # raises what Python says of such a call
            args, kwargs = (), {**named, **kwargs}
        if adapter_names is None:
            if torch.compiler.is_compiling():
                return self.base_model.model(*args, **kwargs)
            with self.base_model.gate.reading():
                return self.base_model.model(*args, **kwargs)
        return self.base_model.forward_mixed(adapter_names, args, kwargs)

    return forward


@in_place_of(peft.PeftModel)
class PeftModel(peft.PeftModel):
    """``peft.PeftModel`` with accelerated layers, whose checks come first, and whose errors leave no trace.

    Also the first base of the classes for tasks, whose second is PEFT's.
    """

    forward = _forward_as(peft.PeftModel)

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        check_unadapted(model)
        check_name(adapter_name)
        plan = plan_adapter(model, IA3Config.of(peft_config))
        with all_or_nothing(model, adapter_name):
            with injecting(model, plan, adapter_name):
                super().__init__(model, plan.exact_config(), adapter_name, **kwargs)
            self.base_model.peft_config[adapter_name] = plan.config
            self.training = model.training
            install(self)
            log_report(self)

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """Add a new adapter, which is not active unless there is no other; PEFT's method.

        Raises :class:`IA3Error`, and changes nothing.
        """
        check_name(adapter_name, self.peft_config)
        plan = plan_adapter(self.get_base_model(), IA3Config.of(peft_config))
        self._add(adapter_name, plan, *args, **kwargs)

    def _add(self, adapter_name: str, plan: Plan, *args: Any, **kwargs: Any) -> None:
        is_first = not self.active_adapters
        with all_or_nothing(self.get_base_model(), adapter_name):
            with injecting(self.get_base_model(), plan, adapter_name):
                super().add_adapter(adapter_name, plan.exact_config(), *args, **kwargs)
            self.peft_config[adapter_name] = plan.config
            if is_first:
                self.set_adapter(adapter_name, plan.config.inference_mode)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Return whether an adapter takes part in the computation."""
        return bool(self.active_adapters) and not self._adapters_disabled

    @property
    def active_peft_config(self) -> Any:
        """Return the configuration of the (first) active adapter; one that means nothing where none is left."""
        return self.peft_config.get(self.active_adapter) or IA3Config()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model within the block; PEFT's method.

        In every thread: where several are in such blocks, adapters act again when the last of them is left.
        """
        gate = self.base_model.gate
        with gate.changing():
            if not gate.disabled and self.peft_config:
                gate.enabling.enter_context(super().disable_adapter())
            gate.disabled += 1
        try:
            yield
        finally:
            with gate.changing():
                gate.disabled -= 1
                if not gate.disabled:
                    gate.enabling.close()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make this adapter the active one, or these, whose vectors then multiply; PEFT's method."""
        names = self.base_model.check_known(adapter_name)
        if not names:
            raise IA3Error("set_adapter got no name; name an adapter, or run the base model in disable_adapter().")
        self.base_model.set_adapter(names if len(names) > 1 else names[0], inference_mode)
        self.active_adapter = names[0]

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        *args: Any,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put a saved adapter into ``model``; PEFT's method, with the file checked before.

        Raises :class:`IA3Error`, and leaves ``model`` as it was, for any file that is damaged or does not fit.
        """
        check_unadapted(model)
        check_name(adapter_name)
        folder, kwargs = _located(model_id, kwargs)
        found = IA3Config.from_pretrained(folder) if config is None else IA3Config.of(config)
        found.inference_mode = not is_trainable
        with readable(model, folder, found) as (folder, found):
            plan = plan_adapter(model, found, strict=False)
            mapping = check_file(model, folder, expected_tensors(plan), key_mapping)
            with all_or_nothing(model, adapter_name):
                with injecting(model, plan, adapter_name), staying(model):
                    # PEFT's own class of this one's task, for files that name none.
                    theirs: Any = next(kind for kind in cls.__mro__ if kind.__module__.partition(".")[0] == "peft")
                    result = theirs.from_pretrained(
                        model, str(folder), adapter_name, is_trainable, plan.exact_config(), *args,
                        key_mapping=mapping, **kwargs,
                    )  # fmt: skip
                install(result)
                log_report(result)
                if config is not None:  # the caller's object is the model's, as in PEFT
                    vars(config).update(vars(plan.config))
                result.peft_config[adapter_name] = config or plan.config
                return result

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved adapter beside those that are there, or into the one of this name; PEFT's method.

        Raises :class:`IA3Error`, and changes nothing.
        """
        base = self.get_base_model()
        folder, kwargs = _located(model_id, kwargs)
        if adapter_name not in self.peft_config:
            check_name(adapter_name)
        plan, config = None, self.peft_config.get(adapter_name) or IA3Config.from_pretrained(folder)
        with readable(base, folder, config) as (folder, config):
            if adapter_name in self.peft_config:
                expected = present_tensors(base, adapter_name)
            else:
                config.inference_mode = not is_trainable
                plan = plan_adapter(base, config, strict=False)
                expected = expected_tensors(plan)
            mapping = check_file(base, folder, expected, key_mapping)
            added = None if plan is None else adapter_name
            with kept(self.base_model.scaled_layers()), all_or_nothing(base, added):
                if plan is not None:
                    self._add(adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype)
                elif any(adapter_name in layer.merged_adapters for _, layer in self.base_model.scaled_layers()):
                    warnings.warn(
                        f"{adapter_name!r} is merged; it is unmerged before vectors are replaced.", stacklevel=2
                    )
                    self.base_model.unmerge_adapter()
                if any(tensor.is_meta for tensor in expected.values()) and plan is None:
                    kwargs["low_cpu_mem_usage"] = True  # there is nothing to copy into
                with staying(base):
                    result = super().load_adapter(
                        str(folder),
                        adapter_name,
                        is_trainable,
                        torch_device,
                        autocast_adapter_dtype,
                        key_mapping=mapping,
                        **kwargs,
                    )
                if is_trainable:
                    self.set_requires_grad(adapter_name)
            return result

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the adapters' files and a model card, all of them or none; PEFT's method."""
        embeddings = kwargs.get("save_embedding_layers", args[2] if len(args) > 2 else "auto")
        if embeddings is True:
            check_embeddings_unmerged(self.get_base_model())
        if kwargs.get("state_dict") is None and any(hasattr(p, "full_tensor") for p in self.parameters()):
            # Sharded: gathered, which all processes have to do together.
            kwargs["state_dict"] = {
                name: getattr(tensor, "full_tensor", lambda own=tensor: own)()
                for name, tensor in self.state_dict().items()
                if "ia3_l" in name or "modules_to_save" in name or not hasattr(tensor, "full_tensor")
            }
        if not all(getattr(config, "scale_queries", True) for config in self.peft_config.values()):
            kwargs["state_dict"] = fused.settled(self.get_base_model(), kwargs.get("state_dict") or self.state_dict())
        target = Path(save_directory)
        with atomic_folder(target) as content:
            if (target / "README.md").is_file():
                shutil.copyfile(target / "README.md", content / "README.md")
            try:
                with expecting_no_config(config.base_model_name_or_path for config in self.peft_config.values()):
                    super().save_pretrained(str(content), *args, **kwargs)
            except KeyError as error:
                raise IA3Error(
                    f"the state_dict lacks {error}; pass that of the whole model: nothing was saved."
                ) from None
            for name in self.peft_config:
                path = (content if name == "default" else content / name) / WEIGHTS_NAME
                if path.is_file():
                    check_saved(path, {plain_name(key) for key in present_tensors(self.get_base_model(), name)})


def _located(model_id: str | os.PathLike[str], source: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the local folder of an adapter, and the arguments that did not serve to find it."""
    used = ("subfolder", "revision", "token", "cache_dir")
    folder = source_folder(model_id, **{name: source[name] for name in used if name in source})
    return folder, {name: value for name, value in source.items() if name not in used}


def _for_task(theirs: Any) -> Any:
    """Return the class for a task: PEFT's, with accelerated layers."""
    own = {
        "forward": _forward_as(theirs),
        "__module__": __name__,
        "__doc__": f"``peft.{theirs.__name__}``, accelerated.",
    }
    return in_place_of(theirs)(type(theirs.__name__, (PeftModel, theirs), own))


PeftModelForCausalLM = _for_task(peft.PeftModelForCausalLM)
PeftModelForSeq2SeqLM = _for_task(peft.PeftModelForSeq2SeqLM)
PeftModelForSequenceClassification = _for_task(peft.PeftModelForSequenceClassification)
PeftModelForTokenClassification = _for_task(peft.PeftModelForTokenClassification)
PeftModelForQuestionAnswering = _for_task(peft.PeftModelForQuestionAnswering)
PeftModelForFeatureExtraction = _for_task(peft.PeftModelForFeatureExtraction)


def _auto(model_class: Any) -> Any:
    """Return the class that loads a base model as well: PEFT's, for this class of models."""
    name = f"Auto{model_class.__name__}"
    theirs = getattr(peft, name)
    return type(name, (theirs,), {"_target_peft_class": model_class, "__module__": __name__, "__doc__": theirs.__doc__})


AutoPeftModel = _auto(PeftModel)
AutoPeftModelForCausalLM = _auto(PeftModelForCausalLM)
AutoPeftModelForSeq2SeqLM = _auto(PeftModelForSeq2SeqLM)
AutoPeftModelForSequenceClassification = _auto(PeftModelForSequenceClassification)
AutoPeftModelForTokenClassification = _auto(PeftModelForTokenClassification)
AutoPeftModelForQuestionAnswering = _auto(PeftModelForQuestionAnswering)
AutoPeftModelForFeatureExtraction = _auto(PeftModelForFeatureExtraction)


def get_peft_model(
    model: nn.Module,
    peft_config: peft.IA3Config,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Put a new adapter into ``model``, in place, and freeze everything else; returns the ``PeftModel`` of its task.

    mixed: adapters of several methods in one model, of which IA3 can be none, in PEFT too; must be ``False``.
    autocast_adapter_dtype: fp32 vectors; else vectors of the base layers' dtype.
    revision: of the base model, noted in the configuration.
    low_cpu_mem_usage: vectors on the ``meta`` device, to be loaded.

    Raises :class:`~ia3.errors.IA3Error` (a ``ValueError``), and leaves ``model`` as it was, where the configuration
    does not fit it. The configuration itself is copied, not changed.
    """
    check_unadapted(model)
    if mixed:
        raise IA3Error("mixed is True, but IA3 adapters cannot be mixed with those of other methods; leave it out.")
    config = IA3Config.of(peft_config)
    config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    config.revision = revision or config.revision
    made = accelerated_class(MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel))
    return made(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
