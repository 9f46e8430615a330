"""PEFT's IA3 layers and tuner with our computation in them.

An accelerated object is the same object with another class: a subclass of its PEFT class, of the same name, so that
``isinstance``, parameters, names, ``repr`` and everything that PEFT does to it stay as they are. Importing this module
needs PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.ia3 import layer as peft_layer
from peft.tuners.ia3 import model as peft_model
from torch import Tensor, nn

from . import held, merging
from .layers import ScaledLayer, scaled_forward
from .mixed import Route, check_batch, generation_repeats
from .mlp import fuse, unfuse
from .quantized_scales import format_of


class _Accelerated(ScaledLayer):
    """The first base of each class below; the second is PEFT's."""

    # What the functions of merging ask of our own layers. Layers that PEFT merges keep the first as it is.
    _held: held.Held | None = None
    _is_suspended = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters and self.merged_adapters and not self._is_suspended:
            self.unmerge()  # what PEFT does here
        if args or kwargs:
            y: Tensor = super(ScaledLayer, self).forward(x, *args, **kwargs)
            return y
        return scaled_forward(self, x)

    def enable_adapters(self, enabled: bool) -> None:
        # At once, and not in the next forward pass as in PEFT: an up projection that holds the vector runs before.
        if not enabled and self._held is not None and not self._is_suspended:
            held.check_unwritten(type(self).__name__, self)
            held.suspend(self)
        super().enable_adapters(enabled)  # type: ignore[misc]
        if enabled and self._is_suspended:
            held.resume(self)

    def unmerge(self) -> None:
        if self._held is None:
            super().unmerge()  # type: ignore[misc]
        else:
            if not self._is_suspended:
                held.hold(self, [], None, ())
            held.forget(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with held.taken_out(self):
            return super()._apply(fn, recurse)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)  # type: ignore[misc]
        self._note_running()


class Linear(_Accelerated, peft_layer.Linear): ...


class Conv2d(_Accelerated, peft_layer.Conv2d): ...


class Conv3d(_Accelerated, peft_layer.Conv3d): ...


_LAYERS: list[type[_Accelerated]] = [Linear, Conv2d, Conv3d]

if is_bnb_available():
    from peft.tuners.ia3 import bnb as peft_bnb

    class Linear8bitLt(_Accelerated, peft_bnb.Linear8bitLt): ...

    _LAYERS.append(Linear8bitLt)

if is_bnb_4bit_available():

    class Linear4bit(_Accelerated, peft_bnb.Linear4bit): ...

    _LAYERS.append(Linear4bit)


class IA3Model(peft_model.IA3Model):
    """PEFT's tuner, which keeps the model accelerated when adapters come, and leaves nothing of ours when they go.

    PEFT merges what it can. Models with quantized layers, which it refuses, are merged by our functions.
    """

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        swap_layers(model)
        fuse(model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around ``forward`` and ``generate`` of PEFT's models: ``adapter_names``, which PEFT has for LoRA only."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        route = Route(self, names, generation_repeats(self.model, args, kwargs))
        check_batch(names, args, kwargs)
        with route:
            yield

    def _to_merge(self) -> list[tuple[str, Any]]:
        """All accelerated layers, if one of them is quantized or holds what our functions merged."""
        layers: list[tuple[str, Any]] = [
            (path, layer) for path, layer in self.model.named_modules() if isinstance(layer, _Accelerated)
        ]
        is_ours = any(layer._held is not None or format_of(layer.base_layer) is not None for _, layer in layers)
        return layers if is_ours else []

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, requantize: bool = False
    ) -> None:
        if layers := self._to_merge():
            merging.merge(self.model, layers, adapter_names, safe_merge, requantize=requantize)
        else:
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        if layers := self._to_merge():
            merging.unmerge(self.model, layers)
        else:
            super().unmerge_adapter()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        layers = self._to_merge()
        if not layers:
            model: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
            return model
        merging.merge_for_good(self.model, layers, adapter_names, safe_merge, progressbar, requantize=requantize)
        return self._unload_and_optionally_merge(merge=False)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        # PEFT's IA3 refuses quantized models even where nothing is to be merged; its base class takes layers out.
        tuner: Any = super() if merge else super(peft_model.IA3Model, self)
        model: nn.Module = tuner._unload_and_optionally_merge(merge, *args, **kwargs)
        unfuse(model)
        return model


# PEFT's class -> ours
_CLASSES: dict[type, type] = {kind.__bases__[1]: kind for kind in _LAYERS} | {peft_model.IA3Model: IA3Model}
_ORIGINALS = {ours: theirs for theirs, ours in _CLASSES.items()}

IA3Layer = peft_layer.IA3Layer


def _swap(model: nn.Module, classes: dict[type, type]) -> None:
    for module in model.modules():
        kind = classes.get(type(module))
        if kind is not None:
            module.__class__ = kind
            module.__dict__.pop("_running", None)
            if isinstance(module, _Accelerated):
                module._note_running()


def swap_layers(model: nn.Module) -> None:
    """Give every IA3 layer and tuner of PEFT in ``model`` our class."""
    _swap(model, _CLASSES)


def restore_layers(model: nn.Module) -> None:
    """Give them PEFT's classes back, and the weights that our functions merged as they were."""
    for module in model.modules():
        if isinstance(module, _Accelerated) and module._held is not None:
            module.unmerge()
    _swap(model, _ORIGINALS)


def is_accelerated(layer: nn.Module) -> bool:
    """Whether a layer of PEFT's runs through our kernels."""
    return isinstance(layer, _Accelerated)
