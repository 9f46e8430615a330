"""Modules that an adapter trains and saves whole (``modules_to_save``): classifier heads, above all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn


class ModulesToSaveWrapper(nn.Module):
    """A frozen module beside one trainable copy of it per adapter; the active adapter's copy runs.

    Attribute names are PEFT's, and with them the names in the model's ``state_dict``. Attributes that this wrapper
    lacks are those of the module that runs.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self._disable_adapters = False
        self.training = original_module.training

    def add_copy(self, adapter_name: str) -> None:
        """Give an adapter its own copy. It is not active yet."""
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)

    def remove_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, where it is known here."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def set_adapter(self, adapter_names: Sequence[str], inference_mode: bool = False) -> None:
        """Run the copy of the first of these adapters that has one; trainable unless ``inference_mode``."""
        self.active_adapters = [name for name in adapter_names if name in self.modules_to_save][:1]
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in self.active_adapters and not inference_mode)

    def running_module(self) -> nn.Module:
        """The module that a call runs."""
        if self._disable_adapters or not self.active_adapters:
            return self.original_module
        return self.modules_to_save[self.active_adapters[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.running_module()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Before __init__ (unpickling, copying) there is nothing to look into.
            if "modules_to_save" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.running_module(), name)
