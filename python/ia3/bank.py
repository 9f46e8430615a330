"""``AdapterBank``: the vectors of many adapters on one model, for batches that mix them.

Each layer has one matrix ``[capacity, n]``, and an adapter a slot: its row in all of them. What is more than fits waits
in host memory or in files until it is asked for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from ia3_kernels import target

from .checkpoint import KEY_PREFIX, WEIGHTS_NAME, check_values, read_tensors, stacked, vector_shape
from .config import IA3Config
from .errors import IA3Error
from .files import source_folder
from .layers import vectors_of
from .model import get_peft_model
from .planning import check_unadapted
from .serving.mixed import BASE_NAME, Sites, unknown_name
from .serving.routing import BASE
from .serving.slots import Adapter, BankReport, Slots
from .swap import all_or_nothing


class AdapterBank:
    """Up to ``capacity`` adapters in the memory of a model's layers, and any number outside.

    model: a base model, with ``config``; or a ``PeftModel``, whose scaled layers are those that adapters of the bank
        may have vectors for. :attr:`model` is the one to call, and gets the bank's adapters by name:
        ``bank.model.generate(…, adapter_names=["fr", "__base__", "de"])``.
    config: which layers of a base model adapters scale, an ``IA3Config``. Left out for a ``PeftModel``:
        ``AdapterBank(model, capacity)``.
    capacity: slots; each costs four bytes for every entry of an adapter's vectors.
    folder: where evicted adapters are written, in a scratch folder of the bank's own; without it they stay in host
        memory.
    host_limit: how many bytes of host memory evicted adapters may take, without ``folder``.

    Adapters are whole in their slot before a batch can see them, and a slot that a running batch reads is not written.
    Every method may be called from any thread, at any time. Errors are :class:`IA3Error`, and change nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any = None,
        capacity: Any = None,
        folder: str | os.PathLike[str] | None = None,
        host_limit: int | None = None,
    ) -> None:
        if capacity is None and not isinstance(config, peft.IA3Config):
            config, capacity = None, config
        for name, value in (("capacity", capacity), ("host_limit", 1 if host_limit is None else host_limit)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise IA3Error(f"{name} is {value!r:.200}; expected a number above 0.")
        tuner: Any = getattr(model, "base_model", None)
        if config is None and not hasattr(tuner, "bank"):
            raise IA3Error(
                f"model is a {type(model).__name__}, whose layers do not tell what adapters may scale; pass an "
                "IA3Config as well, AdapterBank(model, config, capacity), or a PeftModel of ia3."
            )
        if getattr(tuner, "bank", None) is not None:
            raise IA3Error("the model has a bank already; load into that one, or close it first.")
        self.capacity = capacity
        self._lock = threading.RLock()
        self._adapters: dict[str, Adapter] = {}
        self._sites: Sites | None = None
        self.scales: dict[nn.Module, Tensor | None] = {}
        self._places: dict[str, tuple[int, ...]] = {}
        self.model: Any = model
        if config is not None:
            check_unadapted(model)
        with nullcontext() if config is None else all_or_nothing(model, "default"):
            if config is not None:
                self.model = get_peft_model(model, config)
            self._tuner: Any = self.model.base_model
            self._slots = Slots(capacity, host_limit)
            self._cover(self._tuner.sites())
            if folder is not None:
                try:
                    Path(folder).mkdir(parents=True, exist_ok=True)
                    self._slots.folder = Path(tempfile.mkdtemp(prefix="evicted-", dir=folder))
                except OSError as error:
                    raise IA3Error(f"cannot write into {folder}: {error.strerror}; choose another folder.") from error
        self._tuner.bank = self

    # --- what is there ------------------------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._adapters))

    def report(self) -> BankReport:
        """Return what the bank holds, in adapters and bytes, and what it has done."""
        with self._lock:
            adapters = list(self._adapters.values())
            outside = [adapter for adapter in adapters if adapter.slot is None]
            size = 4 * self._slots.entry_count
            return BankReport(
                capacity=self.capacity,
                resident=len(adapters) - len(outside),
                evicted=len(outside),
                pinned=sum(adapter.is_pinned for adapter in adapters),
                in_use=sum(adapter.users > 0 for adapter in adapters),
                slot_bytes=size * self.capacity,
                host_bytes=size * sum(adapter.vectors is not None for adapter in outside),
                file_bytes=size * sum(adapter.file is not None for adapter in adapters),
                hits=self._slots.hits,
                misses=self._slots.misses,
                evictions=self._slots.evictions,
            )

    # --- coming and going ---------------------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        pin: bool = False,
        replace: bool = False,
    ) -> None:
        """Put an adapter into a slot; where none is free, the least recently used adapter leaves its own.

        source: the folder of a saved adapter, or its name on a model hub; or the tensors by their keys
            in such a file. A layer it has no vector for is not scaled.
        pin: never evict it.
        replace: take the place of an adapter of this name; batches that are running with that one keep it.

        Raises :class:`IA3Error` for a file that is damaged or does not fit, and where every slot is pinned or in use.
        """
        if not isinstance(name, str) or not name or name == BASE_NAME:
            raise IA3Error(f"the adapter's name is {name!r:.200}; expected a name, other than {BASE_NAME!r}.")
        self._check_absent(name, replace)
        with self._lock:
            self._cover(self._tuner.sites())
        vectors = self._read(source)
        with self._lock:
            self._check_absent(name, replace)
            old = self._adapters.get(name)
            if old is not None and old.slot is not None and not old.users:
                self._forget(name)  # its slot is the next that is taken
            adapter = Adapter()
            self._slots.enter(adapter, vectors, old)
            if name in self._adapters:
                self._forget(name)
            adapter.is_pinned = pin
            self._adapters[name] = adapter

    def _check_absent(self, name: str, replace: bool) -> None:
        if self._tuner.bank is not self:
            raise IA3Error("the bank is closed; make another.")
        if name in self._adapters and not replace:
            raise IA3Error(f"the bank has an adapter {name!r:.200} already; unload it first, or pass replace=True.")
        if name in self._tuner.peft_config:
            raise IA3Error(f"the model itself has an adapter {name!r:.200}; choose another name.")

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises :class:`IA3Error` where a running batch uses it."""
        with self._lock:
            adapter = self._known(name)
            if adapter.users:
                batches = "a running batch" if adapter.users == 1 else f"{adapter.users} running batches"
                raise IA3Error(f"adapter {name!r} is used by {batches}; unload it when they are done.")
            self._forget(name)

    def pin(self, name: str) -> None:
        """Bring an adapter into a slot, and never evict it."""
        with self._lock:
            adapter = self._known(name)
            self._slots.bring(adapter)
            adapter.is_pinned = True

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again."""
        with self._lock:
            self._known(name).is_pinned = False

    def close(self) -> None:
        """Forget every adapter and leave the model. Raises :class:`IA3Error` where a running batch uses one."""
        with self._lock:
            busy = [name for name, adapter in self._adapters.items() if adapter.users]
            if busy:
                raise IA3Error(f"adapter {busy[0]!r} is used by a running batch; close the bank when it is done.")
            for name in list(self._adapters):
                self._forget(name)
            if self._slots.folder is not None:
                shutil.rmtree(self._slots.folder, ignore_errors=True)
            if self._tuner.bank is self:
                self._tuner.bank = None

    def lease(self, sites: Sites) -> Lease:
        """Hold adapters in their slots while a batch runs (see :class:`~ia3.serving.mixed.MixedBatch`).

        sites: the model as it is now; layers that were added since the bank was made get matrices of ones.
        """
        with self._lock:
            self._cover(sites)
            return Lease(self)

    def __enter__(self) -> AdapterBank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        # A copy of the model, or its pickle, goes without: the slots belong to this model's batches.
        return type(None), ()

    # --- adapters and their slots; called with the lock held ----------------------------------------------------------

    def _known(self, name: str) -> Adapter:
        adapter = self._adapters.get(name)
        if adapter is None:
            raise unknown_name(name, self._adapters, "the bank")
        return adapter

    def _acquire(self, name: str) -> Adapter:
        adapter = self._known(name)
        self._slots.bring(adapter)
        adapter.users += 1
        return adapter

    def _acquire_own(self, name: str) -> Adapter:
        """Give an adapter of the model itself a slot, as it is now, for one batch."""
        assert self._sites is not None
        parts = []
        for _, layer in self._sites.layers:
            vector = next(iter(vectors_of(layer, [name])), None)
            shape = vector_shape(layer, layer.is_feedforward)
            parts.append(torch.ones(shape) if vector is None else vector.detach().to("cpu", torch.float32))
        adapter = Adapter()
        adapter.is_listed = False  # the slot is free again after the batch
        self._slots.enter(adapter, torch.cat([part.reshape(-1) for part in parts]))
        adapter.users = 1
        return adapter

    def _forget(self, name: str) -> None:
        self._slots.forget(self._adapters.pop(name))

    # --- vectors ------------------------------------------------------------------------------------------------------

    def _cover(self, sites: Sites) -> None:
        """Have a matrix for every scaled layer; an adapter that came before its layer does not scale it."""
        if sites is self._sites:
            return
        new = [(path, layer) for path, layer in sites.layers if layer not in self.scales]
        sizes = [layer.in_features if layer.is_feedforward else layer.out_features for _, layer in new]
        needed, memory = 4 * self.capacity * sum(sizes), target.host_memory()
        if needed > memory:  # the system would promise it, and kill whoever uses it
            raise IA3Error(
                f"capacity is {self.capacity:,}, which takes {needed:,} bytes, and this machine has {memory:,}; choose "
                "less: adapters that have no slot are kept outside."
            )
        with torch.inference_mode(False), torch.no_grad():
            for (path, layer), features in zip(new, sizes, strict=True):
                shape = vector_shape(layer, layer.is_feedforward)
                matrix = torch.ones(self.capacity, features, device=layer.base_layer.weight.device)
                if matrix.is_cuda:
                    torch._dynamo.mark_static_address(matrix)  # or a captured graph would copy it in every replay
                self.scales[layer] = matrix
                self._places[f"{KEY_PREFIX}{path}.ia3_l"] = shape
                self._slots.matrices.append(matrix)
        self._sites = sites

    def _read(self, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Tensor:
        """Return the checked vectors of an adapter, those of all layers side by side, in fp32 on the host."""
        if isinstance(source, Mapping):
            tensors, where = source, "the state dict"
            for key, value in source.items():
                if not isinstance(key, str) or not isinstance(value, Tensor):
                    raise IA3Error(
                        f"{where} has {key!r:.200}, a {type(value).__name__}; expected tensors by their names."
                    )
        elif isinstance(source, str | os.PathLike):
            folder = source_folder(source)
            IA3Config.from_pretrained(folder)  # raises for an adapter of another kind
            tensors, where = read_tensors(folder), str(folder / WEIGHTS_NAME)
        else:
            raise IA3Error(f"source is a {type(source).__name__}; expected a folder or a dictionary of tensors.")
        tensors, places = stacked(self._tuner.model, tensors)[0], dict(self._places)
        for key, tensor in tensors.items():
            shape = places.get(key)
            if shape is None:
                raise IA3Error(
                    f"{where} has the tensor {key!r:.200}, which the bank has no place for; it was saved from another "
                    "model or scales layers that this model's own adapters do not: make the bank of one that has them."
                )
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise IA3Error(
                    f"{where} has the tensor {key!r:.200} of shape {list(tensor.shape)!s:.200} and dtype "
                    f"{tensor.dtype}, and the bank takes floating-point vectors of shape {list(shape)} there; load it "
                    "into its own model."
                )
        if not tensors:
            raise IA3Error(f"{where} holds no vectors; save the adapter again.")
        if isinstance(source, Mapping):
            check_values(tensors, where)  # as the reader of files does
        ones = {shape: torch.ones(shape) for key, shape in places.items() if key not in tensors}
        parts = [tensors[key] if key in tensors else ones[shape] for key, shape in places.items()]
        return torch.cat([part.detach().to("cpu", torch.float32).reshape(-1) for part in parts])


class Lease:
    """The adapters of one batch, in their slots until :meth:`close`."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._held: dict[str, Adapter] = {}
        self.scales: Mapping[nn.Module, Tensor | None] = dict(bank.scales)

    def rows(self, names: Sequence[str]) -> list[int]:
        """Return the slots of these adapters, which are held now in place of those before; all of them or an error."""
        bank, held = self._bank, dict[str, Adapter]()
        with bank._lock:
            try:
                for name in dict.fromkeys(names):
                    if name != BASE_NAME:
                        is_own = name not in bank and name in bank._tuner.peft_config
                        held[name] = bank._acquire_own(name) if is_own else bank._acquire(name)
            except BaseException:
                for adapter in held.values():
                    bank._slots.release(adapter)
                raise
            self.close()
            self._held = held
            slots: dict[str, Any] = {name: adapter.slot for name, adapter in held.items()}
        return [slots.get(name, BASE) for name in names]

    def close(self) -> None:
        """Let go of the slots."""
        with self._bank._lock:
            for adapter in self._held.values():
                self._bank._slots.release(adapter)
            self._held = {}
