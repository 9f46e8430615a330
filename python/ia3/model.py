"""``IA3Model``: a transformers model with (IA)³ adapters, used as the model itself is."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import PushToHubMixin

from . import merging, status
from .checkpoint import (
    adapter_folder,
    adapter_tensors,
    check_embeddings_unmerged,
    check_tensors,
    copy_tensors,
    embedding_tensors,
    expected_tensors,
    gathered,
    read_tensors,
    save_adapter,
    write_model_card,
)
from .config import IA3Config, PeftType
from .errors import IA3Error
from .hub import source_folder
from .kbit import require_input_gradients
from .matching import carriers, plan_adapter
from .mixed import Route, check_batch, generation_repeats
from .tuner import IA3Tuner

if TYPE_CHECKING:

    class _Base(nn.Module, PushToHubMixin): ...

else:
    # Trainer, TRL and others ask isinstance(model, peft.PeftModel) to tell whether they should save adapters only. So
    # where PEFT is installed, an IA3Model is one; none of its behaviour comes from there.
    try:
        from peft import PeftModel as _Base
    except ImportError:

        class _Base(nn.Module, PushToHubMixin):
            """What stands in for ``peft.PeftModel`` where PEFT is not installed."""


class _BaseForward:
    """Calls the base model and shows its signature, which Trainer reads to tell what a batch may hold."""

    def __init__(self, tuner: IA3Tuner) -> None:
        self.tuner = tuner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.tuner.model.forward)

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return self.tuner.model(*args, **kwargs)
        return self._mixed(adapter_names, args, kwargs)

    # A graph never sees the names: the model inside is compiled, this frame is not.
    @torch.compiler.disable(recursive=False)
    def _mixed(self, adapter_names: Sequence[str], args: Any, kwargs: dict[str, Any]) -> Any:
        route = Route(self.tuner, adapter_names)
        check_batch(adapter_names, args, kwargs)
        with route:
            return self.tuner.model(*args, **kwargs)


class IA3Model(_Base):
    """A model with (IA)³ vectors; made by :func:`get_peft_model` or :meth:`from_pretrained`.

    Its methods and their arguments are those of PEFT's ``PeftModel``. Whatever it lacks (``config``, ``device``,
    ``gradient_checkpointing_enable``…) is the base model's. The base model is changed in place: matched layers are
    replaced, feed-forward blocks run fused.
    """

    peft_type = PeftType.IA3

    def __init__(self, tuner: IA3Tuner) -> None:
        nn.Module.__init__(self)
        self.base_model = tuner
        self.training = tuner.model.training
        self.forward = _BaseForward(tuner)  # type: ignore[method-assign]

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """The base model's forward, and ``adapter_names``: for each sequence of the batch an adapter of its own.

        The instance's own hides it, and Trainer reads here that batches have labels.
        """
        if labels is not None:
            kwargs["labels"] = labels
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate``.

        adapter_names: for each prompt an adapter of the model or of its bank, ``__base__`` for none. Beams and returned
            sequences take their prompt's. Raises :class:`IA3Error`.
        """
        generate: Any = self.get_base_model().generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        route = Route(self.base_model, adapter_names, generation_repeats(self.get_base_model(), args, kwargs))
        check_batch(adapter_names, args, kwargs)
        with route:
            return generate(*args, **kwargs)

    def generate_batch(self, inputs: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate_batch`` (continuous batching).

        adapter_names: for each of ``inputs`` an adapter, as in :meth:`generate`; see
            :func:`~ia3.continuous.generate_batch` for the arguments that it takes then.
        """
        if adapter_names is None:
            batch: Any = self.get_base_model().generate_batch
            return batch(inputs, *args, **kwargs)
        from .continuous import generate_batch  # what it imports is large, and few need it

        return generate_batch(self.base_model, inputs, adapter_names, *args, **kwargs)

    def route(self, adapter_names: Sequence[str], repeats: int = 1) -> Route:
        """A block in which each sequence of a batch runs with the adapter named for it, in this thread.

        For loops over :meth:`forward`, which would else look the names up in each call, and for CUDA graphs; see
        :class:`~ia3.mixed.Route`.
        """
        return Route(self.base_model, adapter_names, repeats)

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, IA3Config]:
        """The configurations of the adapters, by name."""
        return self.base_model.peft_config

    @property
    def active_peft_config(self) -> IA3Config:
        """The configuration of the (first) active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that take part."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The name of the (first) adapter that takes part."""
        if not self.active_adapters:
            raise IA3Error("no adapter is active: the model has none, or all were deleted; add or load one.")
        return self.active_adapters[0]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter takes part in the computation."""
        enabled = any(not carrier._disable_adapters for _, carrier in carriers(self.get_base_model()))
        return bool(self.active_adapters) and enabled

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names in the adapters' ``modules_to_save``, or ``None``."""
        names = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """The base model's dtype."""
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The base model, with the replaced layers in it."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are; a 4-bit weight counts once for each value."""
        counts = [(status.parameter_count(parameter), parameter.requires_grad) for parameter in self.parameters()]
        return sum(n for n, is_trained in counts if is_trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print both counts and their ratio, in the line that PEFT prints."""
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything
        print(f"trainable params: {trainable:,} || all params: {everything:,} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[status.LayerStatus]:
        """The adapters of each scaled layer; see :func:`ia3.get_layer_status`."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.ModelStatus:
        """The adapters of the model; see :func:`ia3.get_model_status`."""
        return status.get_model_status(self)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let the output of the embeddings of ``model`` require a gradient, as reentrant checkpoints need it."""
        require_input_gradients(model)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: a scaling is no low-rank update."""
        return False

    # --- choosing among adapters ------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: IA3Config,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter, which is not active (:meth:`set_adapter` makes it so) unless there is no other.

        autocast_adapter_dtype: fp32 vectors; else vectors of the base layers' dtype.
        low_cpu_mem_usage: vectors on the ``meta`` device, for :meth:`load_adapter` to fill.

        Raises :class:`IA3Error`, and changes nothing.
        """
        self.base_model.check_new(adapter_name)
        plan = plan_adapter(self.get_base_model(), as_config(peft_config))
        self.base_model.inject(plan, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make this adapter the active one, or these, whose vectors then multiply; see the tuner's method."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters, or freeze them, whether they are active or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; see the tuner's method."""
        self.base_model.delete_adapter(adapter_name)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add the weighted sum of adapters; see the tuner's method."""
        self.base_model.add_weighted_adapter(adapters, weights, adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes what the base model computes.

        Where adapters are merged, they are taken out of the weights for the block, to the bit, and put back: one pass
        over the weights each.
        """
        before = [(carrier, carrier._disable_adapters) for _, carrier in carriers(self.get_base_model())]
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            for carrier, was_disabled in before:
                carrier._disable_adapters = was_disabled
            merging.resume(self.base_model.layers())

    # --- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        exact: bool = True,
        requantize: bool = False,
    ) -> None:
        """Let the base layers hold vectors; see the tuner's method."""
        self.base_model.merge_adapter(adapter_names, safe_merge, exact, requantize)

    def unmerge_adapter(self) -> None:
        """Undo :meth:`merge_adapter`, to the bit."""
        self.base_model.unmerge_adapter()

    def swap_adapter(self, merged: str, adapter_name: str) -> None:
        """Go from one merged adapter to another in one pass over the weights; see the tuner's method."""
        self.base_model.swap_adapter(merged, adapter_name)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """The base model with vectors multiplied into its weights, in place; see the tuner's method."""
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names, requantize)

    def unload(self) -> nn.Module:
        """The base model without adapters; this object is of no use afterwards."""
        return self.base_model.unload()

    # --- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub_arguments: Any,
    ) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT can load, and a model card.

        ``default`` goes into the folder, an adapter of any other name into a sub-folder.

        save_embedding_layers: ``True`` adds the weights of the input and output embeddings, for a vocabulary that was
            resized. PEFT's ``"auto"`` asks a model hub whether it was; here it adds nothing.
        is_main_process: only this process writes; a sharded model is gathered on all of them.
        state_dict: take the adapter's tensors from here, such as what ``Accelerator.get_state_dict`` gathered.
        push_to_hub, repo_id: upload the folder as well; further arguments go to ``huggingface_hub``.

        Raises :class:`IA3Error`.
        """
        if not safe_serialization:
            raise IA3Error("safe_serialization is False, but adapters are saved as safetensors only; leave it out.")
        base = self.get_base_model()
        names = self.base_model.check_known(list(self.peft_config) if selected_adapters is None else selected_adapters)
        if save_embedding_layers is True:
            check_embeddings_unmerged(base)
        for name in names:
            tensors = adapter_tensors(base, name, state_dict)
            if save_embedding_layers is True:
                tensors.update(embedding_tensors(base, state_dict))
            tensors = gathered(tensors)
            config = copy.deepcopy(self.peft_config[name])
            config.inference_mode = True  # what a loaded adapter is for, unless is_trainable says otherwise
            if config.task_type is None:
                config.auto_mapping = {
                    "base_model_class": type(base).__name__,
                    "parent_library": type(base).__module__,
                }
            if is_main_process:
                save_adapter(adapter_folder(save_directory, name), tensors, config)
        if is_main_process and names:
            write_model_card(Path(save_directory), self.peft_config[names[0]])
        if is_main_process and push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **hub_arguments)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a model card, or tell in the one that is there that the folder holds an adapter."""
        write_model_card(Path(output_dir), self.active_peft_config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: IA3Config | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **source: Any,
    ) -> IA3Model:
        """Put a saved adapter (ours or PEFT's) into ``model``.

        model_id: the adapter's local folder, or its name on a model hub. A named adapter's is the sub-folder of its
            name.
        is_trainable: go on training; else everything is frozen, and the model in evaluation mode.
        config: what to use in place of the saved configuration.
        autocast_adapter_dtype: fp32 vectors; else vectors of the base layers' dtype.
        low_cpu_mem_usage: accepted; vectors are small, and loading is the same.
        key_mapping: regular expressions and replacements for the names of modules in the file.
        source: ``subfolder``, and for a hub ``revision``, ``token``, ``cache_dir``.

        Raises :class:`IA3Error`, and leaves ``model`` as it was, for any file that is damaged or does not fit.
        """
        _check_base_model(model)
        result = cls(IA3Tuner(model))
        result._load(model_id, adapter_name, is_trainable, config, autocast_adapter_dtype, key_mapping, source)
        return result

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **source: Any,
    ) -> Any:
        """Load a saved adapter beside those that are there, or into the one of this name; it does not become active.

        The arguments are those of :meth:`from_pretrained`; vectors go where their base layers are, so ``torch_device``
        has no effect. Returns what ``load_state_dict`` returns: the names of missing and unexpected tensors, none.
        Raises :class:`IA3Error`, and changes nothing.
        """
        return self._load(model_id, adapter_name, is_trainable, None, autocast_adapter_dtype, key_mapping, source)

    def _load(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool,
        config: IA3Config | None,
        autocast_adapter_dtype: bool,
        key_mapping: dict[str, str] | None,
        source: dict[str, Any],
    ) -> Any:
        base = self.get_base_model()
        folder = source_folder(model_id, **source)
        tensors = read_tensors(folder, key_mapping)
        is_new = adapter_name not in self.peft_config
        if is_new:
            self.base_model.check_new(adapter_name)
            config = as_config(config) if config is not None else IA3Config.from_pretrained(folder)
            config.inference_mode = not is_trainable
            plan = plan_adapter(base, config, strict=False)
            check_tensors(tensors, expected_tensors(plan), embedding_tensors(base), folder)
            self.base_model.inject(plan, adapter_name, autocast_adapter_dtype)
        else:
            check_tensors(tensors, adapter_tensors(base, adapter_name), embedding_tensors(base), folder)
            self.base_model.unmerge_with_warning("before vectors are replaced")
        result = copy_tensors(base, adapter_name, tensors)
        if is_trainable:
            self.base_model.set_requires_grad(adapter_name)
        else:
            self.eval()
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            # Before __init__ (unpickling, copying) there is nothing to look into.
            if "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)


def as_config(config: Any) -> IA3Config:
    """A copy of ``config``, which may be PEFT's ``IA3Config`` as well; raises :class:`IA3Error` for anything else."""
    if isinstance(config, IA3Config):
        return copy.deepcopy(config)
    if getattr(config, "peft_type", None) == PeftType.IA3 and hasattr(config, "to_dict"):
        return IA3Config.from_dict(config.to_dict())
    raise IA3Error(f"peft_config is a {type(config).__name__}; expected an ia3.IA3Config: make one.")


def _check_base_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise IA3Error(f"model is a {type(model).__name__}; expected an nn.Module: load it first.")
    if isinstance(model, IA3Model) or any(True for _ in carriers(model)):
        raise IA3Error(
            "the model already carries IA3 adapters; add another with add_adapter or load_adapter, or take them out "
            "with unload() first."
        )


def get_peft_model(
    model: nn.Module,
    peft_config: IA3Config,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> IA3Model:
    """Put a new adapter into ``model``, in place, and freeze everything else.

    mixed: adapters of several methods in one model, of which IA3 can be none, in PEFT too; must be ``False``.
    autocast_adapter_dtype: fp32 vectors; else vectors of the base layers' dtype.
    revision: of the base model, noted in the configuration.
    low_cpu_mem_usage: vectors on the ``meta`` device, to be loaded.

    Raises :class:`~ia3.errors.IA3Error` (a ``ValueError``), and leaves ``model`` as it was, where the configuration
    does not fit it. The configuration itself is copied, not changed.
    """
    _check_base_model(model)
    if mixed:
        raise IA3Error("mixed is True, but IA3 adapters cannot be mixed with those of other methods; leave it out.")
    plan = plan_adapter(model, as_config(peft_config))
    plan.config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    plan.config.revision = revision or plan.config.revision
    result = IA3Model(IA3Tuner(model))
    result.base_model.inject(plan, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    return result


def inject_adapter_in_model(
    peft_config: IA3Config, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False
) -> nn.Module:
    """Put a new adapter into ``model`` and return ``model`` itself, with no wrapper around it; as PEFT's function."""
    return get_peft_model(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage).get_base_model()


def get_peft_model_state_dict(
    model: IA3Model,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter by the keys of a file, as PEFT's function; raises :class:`IA3Error`."""
    model.base_model.check_known(adapter_name)
    tensors = adapter_tensors(model.get_base_model(), adapter_name, state_dict)
    if save_embedding_layers is True:
        check_embeddings_unmerged(model.get_base_model())
        tensors.update(embedding_tensors(model.get_base_model(), state_dict))
    return tensors


def set_peft_model_state_dict(
    model: IA3Model, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default"
) -> Any:
    """Write such tensors into an adapter of the model; all or nothing, raises :class:`IA3Error`."""
    model.base_model.check_known(adapter_name)
    base = model.get_base_model()
    check_tensors(
        peft_model_state_dict, adapter_tensors(base, adapter_name), embedding_tensors(base), "peft_model_state_dict"
    )
    model.base_model.unmerge_with_warning("before vectors are replaced")
    return copy_tensors(base, adapter_name, peft_model_state_dict)
