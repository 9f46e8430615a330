"""PEFT's IA3 tuner with this package's merging and batches of several adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.ia3 import model as peft_tuner
from torch import nn

from . import experts, fused
from .errors import IA3Error
from .gate import Gate
from .layers import ScaledLayer, vectors_of
from .matching import ALL_LINEAR
from .merging import model as merging
from .merging.layer import forget
from .planning import plan_adapter
from .probing import carriers, is_scaled
from .serving.mixed import MixedBatch, Sites, check_batch, generation_repeats, survey
from .swap import all_or_nothing, in_place_of, install, uninstall


@in_place_of(peft_tuner.IA3Model)
class IA3Model(peft_tuner.IA3Model):
    """PEFT's tuner, which keeps a model accelerated when adapters come, and merges exactly and in place."""

    bank: Any = None  # an AdapterBank's, while there is one
    _sites: Sites | None = None

    @property
    def gate(self) -> Gate:
        """Return what keeps forward passes and merging apart."""
        own = self.__dict__
        return own.get("_gate") or own.setdefault("_gate", Gate())  # type: ignore[no-any-return]

    def sites(self) -> Sites:
        """Return what mixed batches have to know of the model, looked up again when adapters come or go."""
        if self._sites is None:
            self._sites = survey(self.model)
        return self._sites

    def scaled_layers(self) -> list[tuple[str, Any]]:
        """Return the layers with vectors, by name."""
        return [(path, layer) for path, layer in self.model.named_modules() if isinstance(layer, ScaledLayer)]

    def check_known(self, adapter_names: str | Sequence[str]) -> list[str]:
        """Return the names as a list; raises :class:`IA3Error` for one that the model lacks."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
            raise IA3Error(f"the adapter's name is {adapter_names!r:.200}; expected a name, or a list of names.")
        for name in names:
            if name not in self.peft_config:
                raise IA3Error(
                    f"there is no adapter {name!r}; the model has {', '.join(self.peft_config) or 'none'}: correct the "
                    "name, or load it with load_adapter."
                )
        return list(names)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        name = args[0] if args else kwargs["adapter_name"]
        if not self.active_adapters:
            self.active_adapter = name
        config = self.peft_config[name]
        if getattr(config, "target_parameters", None):  # PEFT's own methods pass on a configuration as it is
            self.peft_config[name] = plan_adapter(model, config, strict=False).exact_config()
        super().inject_adapter(model, *args, **kwargs)
        self.peft_config[name] = config
        fused.mark(model, name, config)
        install(model)
        self._sites = None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self.check_known(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.active_adapters:  # of which each layer has chosen one for itself
            self.set_adapter(self.active_adapters, self.peft_config[self.active_adapters[0]].inference_mode)
        self._sites = None

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose vectors are ``Σ weight ∘ vector`` of others; PEFT's method.

        A vector that one of them lacks counts as ones there, and as zeros in PEFT. Raises ``ValueError``.
        """
        names = self.check_known(adapters)
        check_name(adapter_name, self.peft_config)
        if len(names) != len(weights) or not names:
            raise IA3Error(
                f"adapters has {len(names)} names and weights has {len(weights)} numbers; expected one weight for each "
                "of at least one adapter: correct the lists."
            )
        before = dict(self.peft_config)
        parameters = {entry for name in names for entry in getattr(before[name], "target_parameters", None) or ()}
        for name in names:  # PEFT joins lists of modules' names
            config = self.peft_config[name]
            if config.target_modules == ALL_LINEAR:
                paths = {path for path, layer in self.scaled_layers() if name in layer.ia3_l}
                config = dataclasses.replace(config, target_modules=paths)
            if parameters:
                config = dataclasses.replace(config, target_parameters=sorted(parameters))
            self.peft_config[name] = config
        try:
            super().add_weighted_adapter(names, list(weights), adapter_name)
            self.peft_config.update(before)
            self._settle_sum(names, weights, adapter_name)
        except BaseException:
            self.peft_config.update(before)
            if adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise

    @torch.no_grad()
    def _settle_sum(self, names: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Write what PEFT's sum leaves out: missing vectors, vectors as they act, and modules that are saved whole."""
        for _, carrier in carriers(self.model):
            if not is_scaled(carrier):
                owner = next((name for name in names if name in carrier.modules_to_save), None)
                if owner is not None and adapter_name in carrier.modules_to_save:
                    state = carrier.modules_to_save[owner].state_dict()
                    carrier.modules_to_save[adapter_name].load_state_dict(state)
            elif adapter_name in carrier.ia3_l:
                acting = (next(iter(vectors_of(carrier, [name])), 1.0) for name in names)
                total = sum(weight * vector for weight, vector in zip(weights, acting, strict=True))
                carrier.ia3_l[adapter_name].copy_(total)

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

        Forward passes that other threads have begun through the ``PeftModel``, uncompiled, end before, and others
        wait. That holds for everything here that changes weights.
        """
        names = None if adapter_names is None else self.check_known(adapter_names)
        with self.gate.merging():
            merging.merge(self.model, self.scaled_layers(), names, safe_merge, exact, requantize)

    def unmerge_adapter(self) -> None:
        """Undo :meth:`merge_adapter`, bit-exactly.

        Raises :class:`IA3Error`, and changes nothing, where weights were written to in between.
        """
        with self.gate.merging():
            merging.unmerge(self.model, self.scaled_layers())

    def swap_adapter(self, merged: str, adapter_name: str) -> None:
        """Let the weights hold ``adapter_name`` where they hold ``merged``, in one pass over them.

        The bits are those of unmerging the one and merging the other. If ``merged`` was active, ``adapter_name`` is in
        its place. All or nothing; raises :class:`IA3Error`.
        """
        self.check_known([merged, adapter_name])
        with self.gate.merging():
            found = list(carriers(self.model))
            layers = [(path, carrier) for path, carrier in found if isinstance(carrier, ScaledLayer)]
            merging.swap(self.model, layers, merged, adapter_name)
            if merged in self.active_adapters:
                swapped = [adapter_name if name == merged else name for name in self.active_adapters]
                active = list(dict.fromkeys(swapped))
                for _, carrier in found:
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
        with self.gate.merging():
            layers = self.scaled_layers()
            with merging.kept(layers):
                merging.merge_for_good(self.model, layers, names, safe_merge, progressbar, requantize)
                model = self._unload_and_optionally_merge(adapter_names=adapter_names)
            for _, layer in layers:
                forget(layer)
        return model

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        with self.gate.merging(), all_or_nothing(self.model):
            uninstall(self.model)
            experts.unwrap(self.model)
            # PEFT's IA3 refuses quantized models even where nothing is to be merged; its base class does the rest.
            model: nn.Module = super(peft_tuner.IA3Model, self)._unload_and_optionally_merge(merge, *args, **kwargs)
        self._sites = self.bank = None
        return model

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # All layers or none; each layer would do its own.
        layers = self.scaled_layers()
        with self.gate.changing():
            merging.suspend(layers, not enabled)
            super()._enable_adapter_layers(enabled)

    # --- batches of several adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Route ``adapter_names`` around ``generate`` of PEFT's models; PEFT has them for LoRA only."""
        names = kwargs.get("adapter_names")
        if names is None:
            with self.gate.reading():
                yield
            return
        batch = MixedBatch(self, names, generation_repeats(self.model, args, kwargs))
        check_batch(names, args, kwargs)
        with batch:
            yield

    # A graph never sees the names: the model inside is compiled, this frame is not.
    @torch.compiler.disable(recursive=False)
    def forward_mixed(self, adapter_names: Sequence[str], args: Any, kwargs: Any) -> Any:
        """Run the base model's ``forward`` on a batch whose sequences have these adapters."""
        batch = MixedBatch(self, adapter_names)
        check_batch(adapter_names, args, kwargs)
        with batch:
            return self.model(*args, **kwargs)

    def route(self, adapter_names: Sequence[str], repeats: int = 1) -> MixedBatch:
        """Return a block in which each sequence of a batch, in this thread or coroutine, runs with its own adapter.

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
            with self.gate.reading():
                return self.model.generate_batch(inputs, *args, **kwargs)
        from .serving.continuous import generate_batch  # what it imports is large, and few need it

        return generate_batch(self, inputs, adapter_names, *args, **kwargs)


def check_name(adapter_name: Any, known: Any = ()) -> None:
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
