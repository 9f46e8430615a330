"""Adapters in a model: putting them in and taking them out, choosing among them, all or nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import merging
from .config import IA3Config
from .errors import IA3Error
from .interrupts import held_back
from .layers import IA3Layer
from .matching import Plan, Target, carriers
from .mixed import Sites, survey
from .mlp import fuse, unfuse
from .saved_modules import ModulesToSaveWrapper

if TYPE_CHECKING:
    from .bank import AdapterBank


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _names(adapter_names: str | Sequence[str]) -> list[str]:
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


class IA3Tuner(nn.Module):
    """The model with its adapters, without the conveniences of :class:`~ia3.model.IA3Model`.

    It stands between the two, as in PEFT, so that parameter names agree with PEFT's:
    ``base_model.model.<module>.ia3_l.<adapter>``.
    """

    prefix = "ia3_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, IA3Config] = {}
        self.active_adapters: list[str] = []
        self.bank: AdapterBank | None = None
        self._sites: Sites | None = None

    def sites(self) -> Sites:
        """What mixed batches have to know of the model, looked up again when adapters come or go."""
        if self._sites is None:
            self._sites = survey(self.model)
        return self._sites

    def layers(self) -> list[tuple[str, IA3Layer]]:
        """The scaled layers, by name."""
        return [(path, layer) for path, layer in carriers(self.model) if isinstance(layer, IA3Layer)]

    def heads(self) -> list[tuple[str, ModulesToSaveWrapper]]:
        """The modules that adapters train whole, by name."""
        return [(path, head) for path, head in carriers(self.model) if isinstance(head, ModulesToSaveWrapper)]

    def check_known(self, adapter_names: str | Sequence[str]) -> list[str]:
        """The names as a list; raises :class:`IA3Error` for one that the model lacks."""
        names = _names(adapter_names)
        for name in names:
            if name not in self.peft_config:
                raise IA3Error(
                    f"there is no adapter {name!r}; the model has {', '.join(self.peft_config) or 'none'}: correct the "
                    "name, or load it with load_adapter."
                )
        return names

    def check_new(self, adapter_name: str) -> None:
        """Raise :class:`IA3Error` for a name that an adapter cannot have."""
        if (
            not isinstance(adapter_name, str)
            or not adapter_name
            or any(part in adapter_name for part in (".", "/", "\\", "ia3_"))
        ):
            raise IA3Error(
                f"adapter_name is {adapter_name!r}; expected a name without dots, slashes and 'ia3_', such as "
                "'default': rename it."
            )
        if hasattr(nn.ParameterDict, adapter_name) or hasattr(nn.ModuleDict(), adapter_name):
            raise IA3Error(
                f"adapter_name is {adapter_name!r}, which is a method of torch's containers; choose another name."
            )
        if adapter_name in self.peft_config:
            raise IA3Error(
                f"the model already has an adapter {adapter_name!r} (it has {', '.join(self.peft_config)}); choose "
                "another name, or delete_adapter it first."
            )

    def inject(
        self,
        plan: Plan,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Add an adapter; the first one becomes the active one, and the base parameters are frozen.

        autocast_adapter_dtype: fp32 vectors over a base of 16 bits; else vectors of the base's dtype.
        low_cpu_mem_usage: vectors on the ``meta`` device, to be loaded.

        After an exception the model is as it was: the same modules, the same ``requires_grad``, no patches. Raises
        :class:`IA3Error`.
        """
        self.check_new(adapter_name)
        model, config = self.model, plan.config
        was_trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
        was_active = self.active_adapters
        self._sites = None
        originals: list[tuple[str, nn.Module]] = []
        try:
            unfuse(model)  # a new adapter may reach blocks that had no vector
            for target in plan.targets:
                layer = target.module
                if not isinstance(layer, IA3Layer):
                    originals.append((target.path, layer))
                    layer = IA3Layer(layer, target.is_feedforward)
                    layer.active_adapters = list(was_active)
                    _replace(model, target.path, layer)
                dtype = _dtype_of(layer)
                if autocast_adapter_dtype:
                    dtype = torch.promote_types(dtype, torch.float32)
                layer.add_vector(adapter_name, config.init_ia3_weights, dtype, low_cpu_mem_usage)
            for path, module in plan.saved:
                if not isinstance(module, ModulesToSaveWrapper):
                    originals.append((path, module))
                    module = ModulesToSaveWrapper(module)
                    _replace(model, path, module)
                module.add_copy(adapter_name)
            self.peft_config[adapter_name] = config
            if not was_active:
                model.requires_grad_(False)
                self.set_adapter(adapter_name, config.inference_mode)
            fuse(model)
        except BaseException:
            unfuse(model)
            self.peft_config.pop(adapter_name, None)
            for path, module in originals:
                _replace(model, path, module)
            for _, carrier in carriers(model):
                carrier.remove_adapter(adapter_name)
            self.active_adapters = was_active
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in was_trainable)
            fuse(model)
            raise

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones: their vectors multiply together.

        inference_mode: freeze them; else they, and no others, are trained.
        """
        names = self.check_known(adapter_name)
        self.unmerge_with_warning("before others are active")
        self._activate(names, inference_mode)

    def _activate(self, names: list[str], inference_mode: bool) -> None:
        self.active_adapters = names
        for _, carrier in carriers(self.model):
            carrier.set_adapter(names, inference_mode)

    def unmerge_with_warning(self, occasion: str) -> None:
        """Unmerge where something is merged, because the vectors in the weights are to change."""
        if any(layer.merged for _, layer in self.layers()):
            warnings.warn(f"adapters are merged into the weights; they are unmerged {occasion}.", stacklevel=4)
            self.unmerge_adapter()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters, or freeze them, whether they are active or not."""
        names = self.check_known(adapter_names)
        for _, layer in self.layers():
            for name in names:
                if name in layer.ia3_l:
                    layer.ia3_l[name].requires_grad_(requires_grad)
        for _, head in self.heads():
            for name in names:
                if name in head.modules_to_save:
                    head.modules_to_save[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the only active one, the first of the others becomes active, with a warning."""
        self.check_known(adapter_name)
        merged = next((path for path, layer in self.layers() if adapter_name in layer.merged_adapters), None)
        if merged is not None:
            raise IA3Error(
                f"adapter {adapter_name!r} is merged into the weights of {merged!r} and others; unmerge_adapter first."
            )
        was_active = self.active_adapters
        del self.peft_config[adapter_name]
        for _, carrier in carriers(self.model):
            carrier.remove_adapter(adapter_name)
        self.active_adapters = [name for name in was_active if name != adapter_name]
        if was_active and not self.active_adapters and self.peft_config:
            successor = next(iter(self.peft_config))
            warnings.warn(f"the active adapter {adapter_name!r} is deleted; {successor!r} is active now.", stacklevel=3)
            self.set_adapter(successor, self.peft_config[successor].inference_mode)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose vectors are ``Σ weight ∘ vector`` of others; a vector that one lacks counts as ones.

        It is neither active nor trained. Raises :class:`IA3Error`, and changes nothing.
        """
        names = self.check_known(adapters)
        self.check_new(adapter_name)
        if len(names) != len(weights) or not names:
            raise IA3Error(
                f"adapters has {len(names)} names and weights has {len(weights)} numbers; expected one weight for each "
                "of at least one adapter: correct the lists."
            )
        layers = [(path, layer) for path, layer in self.layers() if any(name in layer.ia3_l for name in names)]
        heads = [(path, head) for path, head in self.heads() if any(name in head.modules_to_save for name in names)]
        for path, head in heads:
            owners = [name for name in names if name in head.modules_to_save]
            if len(owners) > 1:
                raise IA3Error(
                    f"{path!r} is trained whole by {', '.join(owners)}, and whole modules cannot be averaged; combine "
                    "adapters of which at most one has modules_to_save."
                )
        targets = tuple(Target(path, layer, layer.is_feedforward) for path, layer in layers)
        self.inject(Plan(_combined([self.peft_config[name] for name in names]), targets, tuple(heads)), adapter_name)
        with torch.no_grad():
            for _, layer in layers:
                vector = layer.ia3_l[adapter_name]
                parts = [layer.ia3_l[name] if name in layer.ia3_l else torch.ones_like(vector) for name in names]
                vector.copy_(sum(weight * part for weight, part in zip(weights, parts, strict=True)))
            for _, head in heads:
                owner = next(name for name in names if name in head.modules_to_save)
                head.modules_to_save[adapter_name].load_state_dict(head.modules_to_save[owner].state_dict())

    def disable_adapter_layers(self) -> None:
        """Leave the vectors out of the computation; merged ones are taken out of the weights until they are enabled."""
        merging.suspend(self.layers())
        for _, carrier in carriers(self.model):
            carrier._disable_adapters = True

    def enable_adapter_layers(self) -> None:
        """Let the vectors take part in the computation again; merged ones go back into the weights."""
        for _, carrier in carriers(self.model):
            carrier._disable_adapters = False
        merging.resume(self.layers())

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
        merging.merge(self.model, self.layers(), self._checked(adapter_names), safe_merge, exact, requantize)

    def unmerge_adapter(self) -> None:
        """Undo :meth:`merge_adapter`, to the bit.

        Raises :class:`IA3Error`, and changes nothing, where weights were written to in between.
        """
        merging.unmerge(self.model, self.layers())

    def swap_adapter(self, merged: str, adapter_name: str) -> None:
        """Let the weights hold ``adapter_name`` where they hold ``merged``, in one pass over them.

        The bits are those of unmerging the one and merging the other. If ``merged`` was active, ``adapter_name`` is in
        its place. All or nothing; raises :class:`IA3Error`.
        """
        self.check_known([merged, adapter_name])
        merging.swap(self.model, self.layers(), merged, adapter_name)
        if merged in self.active_adapters:
            swapped = [adapter_name if name == merged else name for name in self.active_adapters]
            self._activate(list(dict.fromkeys(swapped)), self.peft_config[adapter_name].inference_mode)

    def _checked(self, adapter_names: str | Sequence[str] | None) -> list[str] | None:
        return None if adapter_names is None else self.check_known(adapter_names)

    def unload(self) -> nn.Module:
        """Take every adapter out and return the base model, its weights as they are."""
        unfuse(self.model)
        for path, carrier in list(carriers(self.model)):
            original = carrier.base_layer if isinstance(carrier, IA3Layer) else carrier.original_module
            _replace(self.model, path, original)
        self.peft_config.clear()
        self.active_adapters = []
        self._sites = self.bank = None
        return self.model

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
        names = self._checked(adapter_names)
        with held_back() as let_through:
            merging.merge_for_good(self.model, self.layers(), names, safe_merge, progressbar, let_through, requantize)
            for path, head in self.heads():
                _replace(self.model, path, head.running_module())
            return self.unload()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)


def _dtype_of(layer: IA3Layer) -> torch.dtype:
    """The floating-point dtype that a base layer computes in."""
    base: Any = layer.base_layer
    dtype: torch.dtype = getattr(base, "compute_dtype", None) or base.weight.dtype  # bitsandbytes' 4-bit layers
    return dtype if dtype.is_floating_point else torch.float32


def _combined(configs: list[IA3Config]) -> IA3Config:
    """A configuration that means what all of these mean together."""
    combined = copy.deepcopy(configs[0])
    for field in ("target_modules", "feedforward_modules"):
        values = [getattr(config, field) for config in configs]
        if len({isinstance(value, str) for value in values}) > 1:
            raise IA3Error(
                f"{field} is a list of names in some of the adapters and a regular expression in others; combine "
                "adapters whose configurations have the same form."
            )
        if isinstance(values[0], str):
            setattr(combined, field, "|".join(f"({value})" for value in dict.fromkeys(values)))
        else:
            setattr(combined, field, set().union(*values))
    combined.modules_to_save = list({name: None for config in configs for name in config.modules_to_save or ()}) or None
    return combined
