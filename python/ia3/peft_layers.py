"""PEFT's IA3 layers: how they come into a model, and their classes with this package's computation and merging."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.ia3 import layer as peft_layer
from torch import Tensor, nn

from . import experts, fused
from .layers import ScaledLayer
from .matching import Plan
from .merging import model as merging
from .merging.layer import MergeState, unmerged
from .patching import execution_device
from .probing import base_of, carriers
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
        super().unmerge()  # type: ignore[misc]  # of PEFT's class, the second base
        self.note_running()

    def enable_adapters(self, enabled: bool) -> None:
        # At once, and not in the next forward pass as in PEFT: an up projection that holds the vector runs before.
        if not enabled and self.merged_adapters and self._merge_state is None:
            self.unmerge_inexactly()
        merging.suspend([("layer", self)], not enabled)
        super().enable_adapters(enabled)  # type: ignore[misc]  # of PEFT's class, the second base

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


# --- injection ------------------------------------------------------------------------------------------------------

_KNOWN_TO_PEFT = nn.Conv2d | nn.Conv3d | peft_layer.Conv1D


@contextmanager
def staying(model: nn.Module) -> Iterator[None]:
    """Keep PEFT, within the block, from dispatching a model anew that accelerate has spread or offloaded.

    Its own way back takes all hooks away and knows LoRA's names only; layers that are wrapped keep their hooks.
    """
    places = model.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if places is not None:
            model.__dict__["hf_device_map"] = places


@contextmanager
def _seeming_present(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Show PEFT, within the block, offloaded weights on the device where they run, and where their vectors belong."""
    shown: list[tuple[nn.Module, Any]] = []
    try:
        for layer in layers:
            device, weight = execution_device(layer), layer._parameters.get("weight")
            if device is not None and weight is not None and weight.is_meta:
                values = torch.empty((), dtype=weight.dtype, device=device).expand(weight.shape)  # one number
                layer._parameters["weight"] = nn.Parameter(values, requires_grad=weight.requires_grad)
                shown.append((layer, weight))
        yield
    finally:
        for layer, weight in shown:
            trained: Any = layer._parameters["weight"]
            layer._parameters["weight"] = weight.requires_grad_(trained.requires_grad)


@contextmanager
def injecting(model: nn.Module, plan: Plan, adapter_name: str) -> Iterator[None]:
    """Show PEFT, within the block, linear layers where targets are linear but for their class.

    What PEFT says of nothing that a user did is not passed on; of ``fan_in_fan_out`` the plan has said what there is.
    """
    if not any(True for _ in carriers(model)):
        model.requires_grad_(False)  # PEFT does it where it finds no layers with vectors, as those of experts are
    for target in plan.targets:
        if isinstance(target.module, experts.ExpertsMatrix):
            experts.wrap(model, target.path, ExpertsLayer(target.module))
    bases = ((target.module, base_of(target.module)) for target in plan.targets)
    hidden = [(layer, base) for layer, base in bases if not isinstance(base, experts.ExpertsMatrix)]
    odd = [base for _, base in hidden if not isinstance(base, nn.Linear | _KNOWN_TO_PEFT)]
    kinds = [type(base) for base in odd]
    for base, kind in zip(odd, kinds, strict=True):
        base.__class__ = type(kind.__name__, (kind, nn.Linear), {})
    try:
        with _seeming_present(base for _, base in hidden), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            yield
        fused.mark(model, adapter_name, plan.config)
    finally:
        for base, kind in zip(odd, kinds, strict=True):
            base.__class__ = kind
