"""Putting adapters into a model and taking them out again, all or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ia3_kernels import scale_weight_

from .config import IA3Config
from .errors import IA3Error
from .layers import IA3Linear, effective_scale, plain_weight
from .matching import Plan, carriers
from .mlp import fuse, unfuse
from .saved_modules import ModulesToSaveWrapper


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _check_adapter_name(name: str, taken: dict[str, IA3Config]) -> None:
    if not isinstance(name, str) or not name or "." in name or "/" in name or "\\" in name or "ia3_" in name:
        raise IA3Error(
            f"adapter_name is {name!r}; expected a name without dots, slashes and 'ia3_', such as 'default': rename it."
        )
    if hasattr(nn.ParameterDict, name) or hasattr(nn.ModuleDict(), name):
        raise IA3Error(f"adapter_name is {name!r}, which is a method of torch's containers; choose another name.")
    if name in taken:
        raise IA3Error(f"the model already has an adapter {name!r} (it has {', '.join(taken)}); choose another name.")


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

    def inject(self, plan: Plan, adapter_name: str) -> None:
        """Add an adapter and make it the active one.

        The base parameters are frozen. After an exception the model is as it was: the same modules, the same
        ``requires_grad``, no patches. Raises :class:`IA3Error`.
        """
        _check_adapter_name(adapter_name, self.peft_config)
        model, config = self.model, plan.config
        trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
        was_active = self.active_adapters
        originals: list[tuple[str, nn.Module]] = []
        try:
            unfuse(model)  # a new adapter may reach blocks that had no vector
            for target in plan.targets:
                layer = target.module
                if not isinstance(layer, IA3Linear):
                    originals.append((target.path, layer))
                    layer = IA3Linear(layer, target.is_feedforward)
                    _replace(model, target.path, layer)
                layer.add_vector(adapter_name, config.init_ia3_weights)
            for path, module in plan.saved:
                if not isinstance(module, ModulesToSaveWrapper):
                    originals.append((path, module))
                    module = ModulesToSaveWrapper(module)
                    _replace(model, path, module)
                module.add_copy(adapter_name)
            model.requires_grad_(False)
            self.peft_config[adapter_name] = config
            self.set_adapter([adapter_name], config.inference_mode)
            fuse(model)
        except BaseException:
            unfuse(model)
            self.peft_config.pop(adapter_name, None)
            for path, module in originals:
                _replace(model, path, module)
            for _, carrier in carriers(model):
                carrier.remove_adapter(adapter_name)
            self.set_adapter(was_active)
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in trainable)
            fuse(model)
            raise

    def set_adapter(self, adapter_names: Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; their vectors multiply together."""
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise IA3Error(
                f"there is no adapter {unknown[0]!r}; the model has {', '.join(self.peft_config) or 'none'}: load it."
            )
        self.active_adapters = list(adapter_names)
        for _, carrier in carriers(self.model):
            carrier.set_adapter(adapter_names, inference_mode)

    def set_enabled(self, enabled: bool) -> None:
        """Let the vectors take part in the computation, or leave them out; weights are never touched."""
        for _, carrier in carriers(self.model):
            carrier._disable_adapters = not enabled

    def unload(self) -> nn.Module:
        """Take every adapter out and return the base model, its weights as they are."""
        unfuse(self.model)
        for path, carrier in list(carriers(self.model)):
            original = carrier.base_layer if isinstance(carrier, IA3Linear) else carrier.original_module
            _replace(self.model, path, original)
        self.peft_config.clear()
        self.active_adapters = []
        return self.model

    @torch.no_grad()
    def merge_and_unload(self) -> nn.Module:
        """Multiply the active vectors into the weights, in place, and return the base model without adapters.

        Trained heads take the place of the originals. Raises :class:`IA3Error`, before anything is changed, where a
        weight cannot be scaled (a quantized layer).
        """
        layers = [(path, layer) for path, layer in carriers(self.model) if isinstance(layer, IA3Linear)]
        for path, layer in layers:
            if plain_weight(layer.base_layer) is None:
                raise IA3Error(
                    f"cannot merge into {path!r}, a {type(layer.base_layer).__name__} whose weight is not a plain "
                    "tensor, or which has hooks; run the model unmerged, or load it unquantized."
                )
        uses = Counter(id(weight) for module in self.model.modules() for weight in module._parameters.values())
        for _, layer in layers:
            scale = effective_scale(layer)
            if scale is not None:
                self._untie(layer.base_layer, uses)
                self._merge(layer, scale)
        heads = [(path, head) for path, head in carriers(self.model) if isinstance(head, ModulesToSaveWrapper)]
        for path, head in heads:
            _replace(self.model, path, head.running_module())
        return self.unload()

    @staticmethod
    def _untie(base: nn.Module, uses: Counter[int]) -> None:
        """Give ``base`` parameters of its own where others share them: only this layer is to be scaled."""
        for name, parameter in base._parameters.items():
            if parameter is not None and uses[id(parameter)] > 1:
                uses[id(parameter)] -= 1
                setattr(base, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))

    @staticmethod
    def _merge(layer: IA3Linear, scale: torch.Tensor) -> None:
        base: Any = layer.base_layer
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight  # [out, in]
        scale_weight_(weight, scale, 1 if layer.is_feedforward else 0)
        if not layer.is_feedforward and base.bias is not None:
            scale_weight_(base.bias.unsqueeze(1), scale, 0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)
