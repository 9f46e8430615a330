"""PEFT's IA3 layers with this package's computation and merging: the classes that :mod:`~ia3.swap` gives them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.ia3 import layer as peft_layer
from torch import Tensor, nn

from . import experts
from .layers import ScaledLayer
from .merging import model as merging
from .merging.layer import MergeState, unmerged
from .patching import execution_device
from .swap import in_place_of


class MergingLayer(ScaledLayer):
    """A scaled layer whose weight can hold its vectors, exactly and in place, also where PEFT asks it to."""

    _merge_state: MergeState | None = None

    @property
    def is_suspended(self) -> bool:
        """Return whether what the weight held is taken out, because adapters are disabled."""
        return self._merge_state is not None and self._merge_state.is_suspended

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Let this layer's weight hold these adapters (the active ones); as PEFT's layers do."""
        if merging.to_merge(self, adapter_names):
            merging.merge(self, [("layer", self)], adapter_names, safe_merge)

    def unmerge(self) -> None:
        """Take out of this layer's weight what it holds, bit-exactly."""
        merging.unmerge(self, [("layer", self)])

    def unmerge_inexactly(self) -> None:
        """Divide the weight by vectors that PEFT merged before the layer was accelerated; warns, as PEFT does."""
        super().unmerge()  # type: ignore[misc]
        self.note_running()

    def enable_adapters(self, enabled: bool) -> None:
        # At once, and not in the next forward pass as in PEFT: an up projection that holds the vector runs before.
        if not enabled and self.merged_adapters and self._merge_state is None:
            self.unmerge_inexactly()
        merging.suspend([("layer", self)], not enabled)
        super().enable_adapters(enabled)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Moved, converted or laid out anew, the weights could not be unmerged: it is done to the unmerged ones.
        with unmerged(self):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        is_new = any(f"{prefix}ia3_l.{name}" in state_dict for name in self.merged_adapters)
        if is_new and f"{prefix}base_layer.weight" not in state_dict:
            warnings.warn("adapters are merged; they are unmerged before vectors are replaced.", stacklevel=2)
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@in_place_of(peft_layer.Linear)
class Linear(MergingLayer, peft_layer.Linear):
    """PEFT's layer around an ``nn.Linear`` or ``Conv1D``."""


@in_place_of(peft_layer.Conv2d)
class Conv2d(MergingLayer, peft_layer.Conv2d):
    """PEFT's layer around an ``nn.Conv2d``."""


@in_place_of(peft_layer.Conv3d)
class Conv3d(MergingLayer, peft_layer.Conv3d):
    """PEFT's layer around an ``nn.Conv3d``."""


if is_bnb_available():
    from peft.tuners.ia3 import bnb as peft_bnb

    @in_place_of(peft_bnb.Linear8bitLt)
    class Linear8bitLt(MergingLayer, peft_bnb.Linear8bitLt):
        """PEFT's layer around bitsandbytes' int8."""

    if is_bnb_4bit_available():

        @in_place_of(peft_bnb.Linear4bit)
        class Linear4bit(MergingLayer, peft_bnb.Linear4bit):
            """PEFT's layer around bitsandbytes' 4-bit."""


class ExpertsLayer(MergingLayer, peft_layer.IA3Layer):
    """The vectors of one parameter of experts; :class:`ia3.experts.Experts` around them computes."""

    def __init__(self, base: experts.ExpertsMatrix) -> None:
        nn.Module.__init__(self)
        self.__dict__["base_layer"] = base  # whose experts stand beside this layer
        self.ia3_l = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.is_feedforward = base.is_input
        self.in_features, self.out_features = base.in_features, base.out_features
        self.training = base.experts.training

    def update_layer(self, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Add an adapter's vectors; PEFT calls it."""
        if not len(self.ia3_l):
            self._active_adapter = adapter_name
        make = torch.ones if config.init_ia3_weights else torch.randn
        self.ia3_l[adapter_name] = nn.Parameter(make(self.base_layer.vector_shape))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> Any:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return execution_device(base_layer.experts) or device, dtype

    def unmerged(self) -> Any:
        """Return a block within which the experts hold no vectors."""
        return unmerged(self)
