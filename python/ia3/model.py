"""PEFT's IA3 models with this package's layers: made, loaded, or accelerated where they are.

An accelerated object is the same object with another class: a subclass of its PEFT class, of the same name, so that
``isinstance``, parameters, names, ``repr`` and everything that PEFT does to it stay as they are. What differs is what
computes, what merges, and that files and configurations are checked whole before anything is changed.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.ia3 import layer as peft_layer
from peft.tuners.ia3 import model as peft_tuner
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import mlp
from .checkpoint import (
    COMPILED,
    KEY_PREFIX,
    WEIGHTS_NAME,
    check_tensors,
    embedding_tensors,
    embeddings_of,
    expected_tensors,
    fitting_names,
    present_tensors,
    read_tensors,
)
from .config import IA3Config
from .errors import IA3Error
from .files import atomic_folder, source_folder
from .interrupts import held_back
from .layers import ScaledLayer, give_back_frozen, speed_up_frozen
from .matching import Plan, base_of, carriers, is_scaled, plan_adapter
from .merging import formats
from .merging import model as merging
from .merging.model import MergingLayer
from .reporting import report
from .serving.mixed import MixedBatch, Sites, check_batch, generation_repeats, survey

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)
# The methods by which transformers puts adapters into a model that no PeftModel wraps.
_INJECTING = ("add_adapter", "load_adapter")


# --- layers ---------------------------------------------------------------------------------------------------------


class Linear(MergingLayer, peft_layer.Linear):
    """PEFT's layer around an ``nn.Linear`` or ``Conv1D``."""


class Conv2d(MergingLayer, peft_layer.Conv2d):
    """PEFT's layer around an ``nn.Conv2d``."""


class Conv3d(MergingLayer, peft_layer.Conv3d):
    """PEFT's layer around an ``nn.Conv3d``."""


_LAYERS: list[Any] = [Linear, Conv2d, Conv3d]

if is_bnb_available():
    from peft.tuners.ia3 import bnb as peft_bnb

    class Linear8bitLt(MergingLayer, peft_bnb.Linear8bitLt):  # type: ignore[misc]
        """PEFT's layer around bitsandbytes' int8."""

    _LAYERS.append(Linear8bitLt)

    if is_bnb_4bit_available():

        class Linear4bit(MergingLayer, peft_bnb.Linear4bit):  # type: ignore[misc]
            """PEFT's layer around bitsandbytes' 4-bit."""

        _LAYERS.append(Linear4bit)


# --- the tuner ------------------------------------------------------------------------------------------------------


class IA3Model(peft_tuner.IA3Model):
    """PEFT's tuner, which keeps a model accelerated when adapters come, and merges exactly and in place."""

    bank: Any = None  # an AdapterBank's, while there is one
    _sites: Sites | None = None

    def sites(self) -> Sites:
        """Return what mixed batches have to know of the model, looked up again when adapters come or go."""
        if self._sites is None:
            self._sites = survey(self.model)
        return self._sites

    def scaled_layers(self) -> list[tuple[str, Any]]:
        """Return the layers with vectors, by name."""
        return [(path, layer) for path, layer in self.model.named_modules() if isinstance(layer, MergingLayer)]

    def check_known(self, adapter_names: str | Sequence[str]) -> list[str]:
        """Return the names as a list; raises :class:`IA3Error` for one that the model lacks."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if name not in self.peft_config:
                raise IA3Error(
                    f"there is no adapter {name!r}; the model has {', '.join(self.peft_config) or 'none'}: correct the "
                    "name, or load it with load_adapter."
                )
        return names

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not self.active_adapters:
            self.active_adapter = args[0] if args else kwargs["adapter_name"]
        super().inject_adapter(model, *args, **kwargs)
        _install(model)
        self._sites = None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self.check_known(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for _, layer in self.scaled_layers():
            layer.note_running()
        self._sites = None

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose vectors are ``Σ weight ∘ vector`` of others; PEFT's method.

        A vector that one of them lacks counts as ones there, and as zeros in PEFT. Raises ``ValueError``.
        """
        names = self.check_known(adapters)
        _check_name(adapter_name, self.peft_config)
        if len(names) != len(weights) or not names:
            raise IA3Error(
                f"adapters has {len(names)} names and weights has {len(weights)} numbers; expected one weight for each "
                "of at least one adapter: correct the lists."
            )
        super().add_weighted_adapter(names, list(weights), adapter_name)
        with torch.no_grad():
            for _, carrier in carriers(self.model):
                if not is_scaled(carrier):
                    owner = next((name for name in names if name in carrier.modules_to_save), None)
                    if owner is not None and adapter_name in carrier.modules_to_save:
                        state = carrier.modules_to_save[owner].state_dict()
                        carrier.modules_to_save[adapter_name].load_state_dict(state)
                elif adapter_name in carrier.ia3_l:
                    missing = (w for name, w in zip(names, weights, strict=True) if name not in carrier.ia3_l)
                    carrier.ia3_l[adapter_name].add_(sum(missing))

    # --- merging

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        exact: bool = True,
        requantize: bool = False,
    ) -> None:
        """Let the base layers hold the vectors of these adapters (of the active ones): no cost in inference.

        The weights are scaled where they lie. All or nothing: after an error or an interrupt every layer is as it was.
        A weight that other modules use too (embeddings tied to an adapted head) is replaced by a scaled copy.

        safe_merge: raise if a weight would not be finite.
        exact: keep one bit a weight, by which unmerging restores every bit; else there is no unmerging.
        requantize: quantize a weight anew where it has no scales that could hold a vector (the input side of a layer
            that no gated block feeds), and warn of the error.

        Vectors go into the scales of quantized layers, whose codes stay as they are; the input side of a gated block's
        down projection goes into the up projection's. Raises :class:`IA3Error` where that cannot be.
        """
        names = None if adapter_names is None else self.check_known(adapter_names)
        merging.merge(self.model, self.scaled_layers(), names, safe_merge, exact, requantize)

    def unmerge_adapter(self) -> None:
        """Undo :meth:`merge_adapter`, bit-exactly.

        Raises :class:`IA3Error`, and changes nothing, where weights were written to in between.
        """
        merging.unmerge(self.model, self.scaled_layers())

    def swap_adapter(self, merged: str, adapter_name: str) -> None:
        """Let the weights hold ``adapter_name`` where they hold ``merged``, in one pass over them.

        The bits are those of unmerging the one and merging the other. If ``merged`` was active, ``adapter_name`` is in
        its place. All or nothing; raises :class:`IA3Error`.
        """
        self.check_known([merged, adapter_name])
        merging.swap(self.model, self.scaled_layers(), merged, adapter_name)
        if merged in self.active_adapters:
            swapped = [adapter_name if name == merged else name for name in self.active_adapters]
            active = list(dict.fromkeys(swapped))
            for _, carrier in carriers(self.model):
                if is_scaled(carrier):
                    carrier.set_adapter(active, inference_mode=self.peft_config[adapter_name].inference_mode)
                elif adapter_name in carrier.modules_to_save:
                    carrier.set_adapter(adapter_name)
            self.active_adapter = active if len(active) > 1 else active[0]

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """Multiply vectors into the weights, in place, and return the base model without adapters.

        The arguments are those of :meth:`merge_adapter`. Trained heads take the place of the originals. All or nothing:
        after an error or an interrupt every layer is as it was. Raises :class:`IA3Error` where a weight cannot be
        scaled.
        """
        names = None if adapter_names is None else self.check_known(adapter_names)
        layers = self.scaled_layers()
        with held_back() as let_through:
            merging.merge_for_good(self.model, layers, names, safe_merge, progressbar, let_through, requantize)
            model = self._unload_and_optionally_merge(merge=True, adapter_names=adapter_names)
        return model

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        layers = [layer for _, layer in self.scaled_layers()]
        _uninstall(self.model)
        # PEFT's IA3 refuses quantized models even where nothing is to be merged; its base class does the rest.
        model: nn.Module = super(peft_tuner.IA3Model, self)._unload_and_optionally_merge(merge, *args, **kwargs)
        for layer in layers if merge else ():
            merging.forget(layer)
        self._sites = self.bank = None
        return model

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # All layers or none; each layer would do its own.
        layers = self.scaled_layers()
        (merging.resume if enabled else merging.suspend)(layers)
        super()._enable_adapter_layers(enabled)

    # --- batches of several adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around ``forward`` and ``generate`` of PEFT's models: ``adapter_names``, which PEFT has for LoRA only."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        batch = MixedBatch(self, names, generation_repeats(self.model, args, kwargs))
        check_batch(names, args, kwargs)
        with batch:
            yield

    def route(self, adapter_names: Sequence[str], repeats: int = 1) -> MixedBatch:
        """Return a block in which each sequence of a batch runs with the adapter named for it, in this thread.

        For loops over ``forward``, which would else look the names up in each call, and for CUDA graphs; see
        :class:`~ia3.serving.mixed.MixedBatch`.
        """
        return MixedBatch(self, adapter_names, repeats)

    def generate_batch(self, inputs: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the base model's ``generate_batch`` (continuous batching).

        adapter_names: for each of ``inputs`` an adapter, ``__base__`` for none; see
            :func:`~ia3.serving.continuous.generate_batch` for the arguments that it takes then.
        """
        if adapter_names is None:
            return self.model.generate_batch(inputs, *args, **kwargs)
        from .serving.continuous import generate_batch  # what it imports is large, and few need it

        return generate_batch(self, inputs, adapter_names, *args, **kwargs)


# --- models ---------------------------------------------------------------------------------------------------------


class PeftModel(peft.PeftModel):
    """``peft.PeftModel`` with accelerated layers, whose checks come first, and whose errors leave no trace.

    Also the first base of the classes for tasks, whose second is PEFT's.
    """

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        check_unadapted(model)
        _check_name(adapter_name)
        plan = plan_adapter(model, IA3Config.of(peft_config))
        with _all_or_nothing(model, adapter_name):
            with _as_linear(plan):
                super().__init__(model, plan.exact_config(), adapter_name, **kwargs)
            self.base_model.peft_config[adapter_name] = plan.config
            accelerate(self)

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """Add a new adapter, which is not active unless there is no other; PEFT's method.

        Raises :class:`IA3Error`, and changes nothing.
        """
        _check_name(adapter_name, self.peft_config)
        plan = plan_adapter(self.get_base_model(), IA3Config.of(peft_config))
        self._add(adapter_name, plan, *args, **kwargs)

    def _add(self, adapter_name: str, plan: Plan, *args: Any, **kwargs: Any) -> None:
        is_first = not self.active_adapters
        with _all_or_nothing(self.get_base_model(), adapter_name):
            with _as_linear(plan):
                super().add_adapter(adapter_name, plan.exact_config(), *args, **kwargs)
            self.peft_config[adapter_name] = plan.config
            if is_first:
                self.set_adapter(adapter_name, plan.config.inference_mode)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter takes part in the computation."""
        return bool(self.active_adapters) and not self._adapters_disabled

    @property
    def active_peft_config(self) -> Any:
        """The configuration of the (first) active adapter; one that means nothing where none is left."""
        return self.peft_config.get(self.active_adapter) or IA3Config()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make this adapter the active one, or these, whose vectors then multiply; PEFT's method."""
        names = self.base_model.check_known(adapter_name)
        if len(names) == 1:
            super().set_adapter(names[0], inference_mode)
        else:
            self.base_model.set_adapter(names, inference_mode)
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
        _check_name(adapter_name)
        folder, kwargs = _located(model_id, kwargs)
        found = IA3Config.from_pretrained(folder) if config is None else IA3Config.of(config)
        found.inference_mode = not is_trainable
        plan = plan_adapter(model, found, strict=False)
        mapping = _check_file(model, folder, expected_tensors(plan), key_mapping)
        with _all_or_nothing(model, adapter_name):
            with _as_linear(plan):
                result = peft.PeftModel.from_pretrained(
                    model, str(folder), adapter_name, is_trainable, plan.exact_config(), *args,
                    key_mapping=mapping, **kwargs,
                )  # fmt: skip
            result.peft_config[adapter_name] = plan.config
            return accelerate(result)

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
        plan = None
        if adapter_name in self.peft_config:
            expected = present_tensors(base, adapter_name)
        else:
            _check_name(adapter_name)
            config = IA3Config.from_pretrained(folder)
            config.inference_mode = not is_trainable
            plan = plan_adapter(base, config, strict=False)
            expected = expected_tensors(plan)
        mapping = _check_file(base, folder, expected, key_mapping)
        with _all_or_nothing(base, adapter_name):
            if plan is not None:
                self._add(adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype)
            elif any(adapter_name in layer.merged_adapters for _, layer in self.base_model.scaled_layers()):
                warnings.warn(f"{adapter_name!r} is merged; it is unmerged before vectors are replaced.", stacklevel=2)
                self.base_model.unmerge_adapter()
            if any(tensor.is_meta for tensor in expected.values()) and plan is None:
                kwargs["low_cpu_mem_usage"] = True  # there is nothing to copy into
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
        if kwargs.get("safe_serialization", args[0] if args else True) is not True:
            raise IA3Error("safe_serialization is False, but adapters are saved as safetensors only; leave it out.")
        embeddings = kwargs.get("save_embedding_layers", args[2] if len(args) > 2 else "auto")
        if embeddings is True:
            _check_embeddings_unmerged(self.get_base_model())
        if kwargs.get("state_dict") is None and any(hasattr(p, "full_tensor") for p in self.parameters()):
            # Sharded: gathered, which all processes have to do together.
            kwargs["state_dict"] = {
                name: getattr(tensor, "full_tensor", lambda own=tensor: own)()
                for name, tensor in self.state_dict().items()
                if "ia3_l" in name or "modules_to_save" in name or not hasattr(tensor, "full_tensor")
            }
        target = Path(save_directory)
        with atomic_folder(target) as content:
            if (target / "README.md").is_file():
                shutil.copyfile(target / "README.md", content / "README.md")
            try:
                super().save_pretrained(str(content), *args, **kwargs)
            except KeyError as error:
                raise IA3Error(
                    f"the state_dict lacks {error}; pass that of the whole model: nothing was saved."
                ) from None
            for name in self.peft_config:
                path = (content if name == "default" else content / name) / WEIGHTS_NAME
                if path.is_file():
                    _check_saved(path, {_plain(key) for key in present_tensors(self.get_base_model(), name)})


def _plain(name: str) -> str:
    """Return a tensor's name without what torch.compile and FSDP put into it."""
    return name.replace(COMPILED, "").replace("_fsdp_wrapped_module.", "")


def _check_saved(path: Path, expected: set[str]) -> None:
    """Raise :class:`IA3Error` where a saved adapter lacks tensors; names in it become those of a plain model."""
    tensors = load_file(path)
    missing = sorted(expected - {_plain(name) for name in tensors})
    if missing:
        raise IA3Error(
            f"the state_dict lacks {missing[0]!r} and {len(missing) - 1} others of the adapter's {len(expected)} "
            "tensors; pass that of the whole model: nothing was saved."
        )
    if any(name != _plain(name) for name in tensors):
        save_file({_plain(name): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})


def _check_embeddings_unmerged(model: nn.Module) -> None:
    for embedding in embeddings_of(model):
        if isinstance(embedding, ScaledLayer) and embedding.merged_adapters:
            raise IA3Error(
                f"{', '.join(embedding.merged_adapters)} is merged into the embeddings, which were to be saved; "
                "unmerge_adapter first, or leave save_embedding_layers out."
            )


def _check_name(adapter_name: Any, known: Any = ()) -> None:
    """Raise :class:`IA3Error` for a name that an adapter cannot have."""
    if (
        not isinstance(adapter_name, str)
        or not adapter_name
        or any(part in adapter_name for part in (".", "/", "\\", "ia3_"))
    ):
        raise IA3Error(
            f"adapter_name is {adapter_name!r}; expected a name without dots, slashes and 'ia3_', such as 'default': "
            "rename it."
        )
    if hasattr(nn.ParameterDict, adapter_name) or hasattr(nn.ModuleDict(), adapter_name):
        raise IA3Error(
            f"adapter_name is {adapter_name!r}, which is a method of torch's containers; choose another name."
        )
    if adapter_name in known:
        raise IA3Error(
            f"the model already has an adapter {adapter_name!r} (it has {', '.join(known)}); choose another name, or "
            "delete_adapter it first."
        )


def check_unadapted(model: Any) -> None:
    """Raise :class:`IA3Error` for what is no model, or has adapters already."""
    if not isinstance(model, nn.Module):
        raise IA3Error(f"model is a {type(model).__name__}; expected an nn.Module: load it first.")
    if isinstance(model, peft.PeftModel) or any(True for _ in carriers(model)):
        raise IA3Error(
            "the model already carries adapters; add another with add_adapter or load_adapter, run those that it has "
            "with ia3.accelerate, or take them out with unload() first."
        )


def _located(model_id: str | os.PathLike[str], source: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the local folder of an adapter, and the arguments that did not serve to find it."""
    used = ("subfolder", "revision", "token", "cache_dir")
    folder = source_folder(model_id, **{name: source[name] for name in used if name in source})
    return folder, {name: value for name, value in source.items() if name not in used}


def _check_file(
    model: nn.Module, folder: Path, expected: dict[str, Tensor], key_mapping: dict[str, str] | None
) -> dict[str, str]:
    """Raise :class:`IA3Error` for an adapter's file that does not fit; returns the mapping by which PEFT reads it."""
    tensors, optional = read_tensors(folder, key_mapping), embedding_tensors(model)
    renamed = fitting_names(model, tensors, [*expected, *optional])
    check_tensors({renamed.get(name, name): tensor for name, tensor in tensors.items()}, expected, optional, folder)
    exact = {
        f"^{name.removeprefix(KEY_PREFIX)}$".replace(".", r"\."): place.removeprefix(KEY_PREFIX)
        for name, place in renamed.items()
    }
    return {**(key_mapping or {}), **exact}


@contextmanager
def _as_linear(plan: Plan) -> Iterator[None]:
    """Within the block, targets that are linear but for their class are what PEFT takes for a linear layer."""
    hidden = [(layer, base_of(layer)) for layer in (target.module for target in plan.targets)]
    odd = [base for _, base in hidden if not isinstance(base, nn.Linear | _KNOWN_TO_PEFT)]
    kinds = [type(base) for base in odd]
    for base, kind in zip(odd, kinds, strict=True):
        base.__class__ = type(kind.__name__, (kind, nn.Linear), {})
    try:
        yield
    finally:
        for base, kind in zip(odd, kinds, strict=True):
            base.__class__ = kind


_KNOWN_TO_PEFT = nn.Conv2d | nn.Conv3d | peft_layer.Conv1D


@contextmanager
def _all_or_nothing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """After an exception within the block: the same modules and parameters, the same ``requires_grad``."""
    before = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = model.__dict__.get("peft_config")
    known = None if configs is None else dict(configs)
    try:
        yield
    except BaseException:
        _uninstall(model)
        for module, children, parameters in before:
            for now, then in ((module._modules, children), (module._parameters, parameters)):
                now.clear()
                now.update(then)
            if isinstance(module, ModulesToSaveWrapper):
                module._adapters.discard(adapter_name)
        if configs is None or known is None:
            model.__dict__.pop("peft_config", None)
        else:
            configs.clear()
            configs.update(known)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        if any(isinstance(module, ScaledLayer) for module in model.modules()):
            _install(model)
        raise


class PeftModelForCausalLM(PeftModel, peft.PeftModelForCausalLM):
    """``peft.PeftModelForCausalLM`` with accelerated layers."""


class PeftModelForSeq2SeqLM(PeftModel, peft.PeftModelForSeq2SeqLM):
    """``peft.PeftModelForSeq2SeqLM`` with accelerated layers."""


class PeftModelForSequenceClassification(PeftModel, peft.PeftModelForSequenceClassification):
    """``peft.PeftModelForSequenceClassification`` with accelerated layers."""


class PeftModelForTokenClassification(PeftModel, peft.PeftModelForTokenClassification):
    """``peft.PeftModelForTokenClassification`` with accelerated layers."""


class PeftModelForQuestionAnswering(PeftModel, peft.PeftModelForQuestionAnswering):
    """``peft.PeftModelForQuestionAnswering`` with accelerated layers."""


class PeftModelForFeatureExtraction(PeftModel, peft.PeftModelForFeatureExtraction):
    """``peft.PeftModelForFeatureExtraction`` with accelerated layers."""


_MODELS: dict[str | None, Any] = {
    None: PeftModel,
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def _auto(name: str, model_class: Any) -> Any:
    theirs = getattr(peft, name)
    return type(name, (theirs,), {"_target_peft_class": model_class, "__module__": __name__, "__doc__": theirs.__doc__})


AutoPeftModel = _auto("AutoPeftModel", PeftModel)
AutoPeftModelForCausalLM = _auto("AutoPeftModelForCausalLM", PeftModelForCausalLM)
AutoPeftModelForSeq2SeqLM = _auto("AutoPeftModelForSeq2SeqLM", PeftModelForSeq2SeqLM)
AutoPeftModelForSequenceClassification = _auto(
    "AutoPeftModelForSequenceClassification", PeftModelForSequenceClassification
)
AutoPeftModelForTokenClassification = _auto("AutoPeftModelForTokenClassification", PeftModelForTokenClassification)
AutoPeftModelForQuestionAnswering = _auto("AutoPeftModelForQuestionAnswering", PeftModelForQuestionAnswering)
AutoPeftModelForFeatureExtraction = _auto("AutoPeftModelForFeatureExtraction", PeftModelForFeatureExtraction)


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
    made = _MODELS[None if config.task_type is None else config.task_type.value]
    return made(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def inject_adapter_in_model(
    peft_config: peft.IA3Config, model: nn.Module, adapter_name: str = "default", **kwargs: Any
) -> nn.Module:
    """Put a new adapter into ``model`` and return ``model`` itself, with no wrapper around it; as PEFT's function."""
    config = IA3Config.of(peft_config)
    plan = plan_adapter(model, config, strict="state_dict" not in kwargs)
    with _all_or_nothing(model, adapter_name):
        with _as_linear(plan):
            peft.inject_adapter_in_model(plan.exact_config(), model, adapter_name, **kwargs)
        model.peft_config[adapter_name] = plan.config
        return accelerate(model)


# --- acceleration ---------------------------------------------------------------------------------------------------

# PEFT's class -> ours
_CLASSES: dict[type, type] = {kind.__bases__[-1]: kind for kind in (*_LAYERS, *_MODELS.values(), IA3Model)}
_ORIGINALS = {ours: theirs for theirs, ours in _CLASSES.items()}


def accelerate(model: _Model) -> _Model:
    """Run the IA3 layers of a ``peft.PeftModel`` on this package's kernels; returns ``model`` itself, changed in place.

    Also takes a transformers model with adapters of its own (``add_adapter``, ``load_adapter``). Layers stay what they
    are for everybody else: instances of PEFT's classes, with the same parameters and names in ``state_dict``. What PEFT
    does afterwards (adding, switching, merging, deleting adapters) works, and keeps the model accelerated. What runs
    where is in ``ia3.report(model)``, and in the log at level INFO.

    Call it before sharding (FSDP) and compiling. A model that is accelerated already stays so. Raises
    :class:`~ia3.errors.IA3Error` where there is nothing to accelerate.
    """
    if not isinstance(model, nn.Module):
        raise IA3Error(f"model is a {type(model).__name__}; expected a peft.PeftModel or a transformers model.")
    if not any(isinstance(module, peft_layer.IA3Layer) for module in model.modules()):
        raise IA3Error(
            f"this {type(model).__name__} has no IA3 layers of PEFT; put an adapter in first, with get_peft_model or "
            "the model's add_adapter."
        )
    _install(model)
    if not any(isinstance(module, IA3Model) for module in model.modules()):
        for name in _INJECTING:
            if hasattr(type(model), name):
                # A partial on the instance can be copied and pickled with the model, and deleted again.
                setattr(model, name, functools.partial(_inject_and_install, model, name))
    logger.info("accelerated:\n%s", report(model))
    return model


def decelerate(model: _Model) -> _Model:
    """Undo :func:`accelerate`; returns ``model`` itself. Weights that hold vectors are unmerged."""
    merged = [("layer", layer) for layer in model.modules() if isinstance(layer, MergingLayer) and layer._merge_state]
    if merged:
        merging.unmerge(model, merged)
    _uninstall(model)
    for module in model.modules():
        theirs = _ORIGINALS.get(type(module))
        if theirs is not None:
            module.__class__ = theirs
            module.__dict__.pop("_running", None)
    for name in _INJECTING:
        patch = model.__dict__.get(name)
        if isinstance(patch, functools.partial) and patch.func is _inject_and_install:
            delattr(model, name)
    return model


def _inject_and_install(model: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method of the class; then the layers that it put in are accelerated as well."""
    result = getattr(type(model), method)(model, *args, **kwargs)
    _install(model)
    return result


def _install(model: nn.Module) -> None:
    """Give PEFT's objects in ``model`` their accelerated classes, and patch what stands around them."""
    for module in list(model.modules()):
        kind = _CLASSES.get(type(module))
        if kind is None:
            continue
        module.__class__ = kind
        inner: Any = module._modules.get("base_layer") or module._modules.get("model") or module._modules["base_model"]
        module.training = inner.training
        if isinstance(module, MergingLayer):
            module.note_running()
    _part_shared(model)
    formats.make_differentiable(model)
    speed_up_frozen(model)
    mlp.fuse(model)


def _uninstall(model: nn.Module) -> None:
    """Take back the patches of :func:`_install`."""
    mlp.unfuse(model)
    give_back_frozen(model)
    formats.give_back(model)


def _part_shared(model: nn.Module) -> None:
    """Give a layer that also stands elsewhere in the model, unscaled, a twin with the same parameters.

    One layer cannot be merged for one of its two parents only; two that share parameters can.
    """
    parents: dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            parents[id(child)] = parents.get(id(child), 0) + 1
    for module in model.modules():
        base = module._modules.get("base_layer")
        if isinstance(module, MergingLayer) and base is not None and parents[id(base)] > 1:
            twin = base.__class__.__new__(base.__class__)
            twin.__dict__.update(base.__dict__)
            for name in ("_parameters", "_buffers", "_modules"):
                twin.__dict__[name] = dict(base.__dict__[name])
            module._modules["base_layer"] = twin
