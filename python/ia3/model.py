"""``IA3Model``: a transformers model with (IA)³ adapters, used as the model itself is."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import (
    WEIGHTS_NAME,
    adapter_folder,
    adapter_tensors,
    check_tensors,
    copy_tensors,
    expected_tensors,
    read_tensors,
    save_adapter,
)
from .config import IA3Config, PeftType
from .errors import IA3Error
from .matching import Plan, carriers, plan_adapter
from .tuner import IA3Tuner


class _BaseForward:
    """Calls the base model and shows its signature, which Trainer reads to tell what a batch may hold."""

    def __init__(self, tuner: IA3Tuner) -> None:
        self.tuner = tuner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.tuner.model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tuner.model(*args, **kwargs)


class IA3Model(nn.Module):
    """A model with (IA)³ vectors; made by :func:`get_peft_model` or :meth:`from_pretrained`.

    Whatever it lacks (``generate``, ``config``, ``device``, ``gradient_checkpointing_enable``…) is the base model's.
    The base model is changed in place: matched layers are replaced, feed-forward blocks run fused.
    """

    peft_type = PeftType.IA3

    def __init__(self, tuner: IA3Tuner) -> None:
        super().__init__()
        self.base_model = tuner
        self.training = tuner.model.training
        self.forward = _BaseForward(tuner)  # type: ignore[method-assign]

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """The base model's forward; the instance's own hides it, and Trainer reads here that batches have labels."""
        if labels is not None:
            kwargs["labels"] = labels
        return self.base_model(*args, **kwargs)

    @property
    def peft_config(self) -> dict[str, IA3Config]:
        """The configurations of the adapters, by name."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that take part."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The name of the (first) adapter that takes part."""
        return self.base_model.active_adapters[0]

    def get_base_model(self) -> nn.Module:
        """The base model, with the replaced layers in it."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(n for n, is_trained in counts if is_trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print both counts and their ratio, in the line that PEFT prints."""
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything
        print(f"trainable params: {trainable:,} || all params: {everything:,} || trainable%: {share:.4f}")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes what the base model computes; weights are not touched."""
        before = [(carrier, carrier._disable_adapters) for _, carrier in carriers(self.base_model.model)]
        self.base_model.set_enabled(False)
        try:
            yield
        finally:
            for carrier, was_disabled in before:
                carrier._disable_adapters = was_disabled

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        **_ignored: Any,
    ) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT can load.

        ``default`` goes into the folder, an adapter of any other name into a sub-folder. Further keyword arguments of
        PEFT's method are accepted and have no effect. Raises :class:`IA3Error`.
        """
        if not safe_serialization:
            raise IA3Error("safe_serialization is False, but adapters are saved as safetensors only; leave it out.")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            if name not in self.peft_config:
                raise IA3Error(f"there is no adapter {name!r} to save; the model has {', '.join(self.peft_config)}.")
        for name in names if is_main_process else ():
            config = copy.deepcopy(self.peft_config[name])
            config.inference_mode = True  # what a loaded adapter is for, unless is_trainable says otherwise
            base = self.base_model.model
            if config.task_type is None:
                config.auto_mapping = {
                    "base_model_class": type(base).__name__,
                    "parent_library": type(base).__module__,
                }
            save_adapter(adapter_folder(save_directory, name), adapter_tensors(base, name), config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: IA3Config | None = None,
    ) -> IA3Model:
        """Put a saved adapter (ours or PEFT's) into ``model``.

        model_id: the adapter's local folder; a named adapter's is the sub-folder of its name.
        is_trainable: go on training; else everything is frozen.

        Raises :class:`IA3Error`, and leaves ``model`` as it was, for any file that is damaged or does not fit.
        """
        _check_base_model(model)
        folder = Path(model_id)
        config = copy.deepcopy(config) if config is not None else IA3Config.from_pretrained(folder)
        config.inference_mode = not is_trainable
        tensors = read_tensors(folder)
        plan = plan_adapter(model, config, strict=False)
        check_tensors(tensors, expected_tensors(plan), folder / WEIGHTS_NAME)
        result = _inject(cls, model, plan, adapter_name)
        copy_tensors(model, adapter_name, tensors)
        return result.eval() if not is_trainable else result

    def unload(self) -> nn.Module:
        """The base model without adapters; this object is of no use afterwards."""
        return self.base_model.unload()

    def merge_and_unload(self) -> nn.Module:
        """The base model with the active vectors multiplied into its weights, in place; see the tuner's method."""
        return self.base_model.merge_and_unload()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Before __init__ (unpickling, copying) there is nothing to look into.
            if "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)


def _check_base_model(model: nn.Module) -> None:
    if isinstance(model, IA3Model) or any(True for _ in carriers(model)):
        raise IA3Error(
            "the model already carries IA3 adapters; pass a base model, or take the adapters out with unload() first."
        )


def _inject(cls: type[IA3Model], model: nn.Module, plan: Plan, adapter_name: str) -> IA3Model:
    tuner = IA3Tuner(model)
    tuner.inject(plan, adapter_name)
    return cls(tuner)


def get_peft_model(model: nn.Module, peft_config: IA3Config, adapter_name: str = "default") -> IA3Model:
    """Put a new adapter into ``model``, in place, and freeze everything else.

    Raises :class:`~ia3.errors.IA3Error` (a ``ValueError``), and leaves ``model`` as it was, where the configuration
    does not fit it. The configuration itself is copied, not changed.
    """
    if not isinstance(model, nn.Module):
        raise IA3Error(f"model is a {type(model).__name__}; expected an nn.Module: load it first.")
    if not isinstance(peft_config, IA3Config):
        raise IA3Error(f"peft_config is a {type(peft_config).__name__}; expected an ia3.IA3Config: make one.")
    _check_base_model(model)
    plan = plan_adapter(model, peft_config)
    plan.config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    return _inject(IA3Model, model, plan, adapter_name)
