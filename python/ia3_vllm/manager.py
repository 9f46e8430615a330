"""The managers that vLLM's worker gets in place of its LoRA managers: they load, activate and evict IA3 adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora import utils
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

from ia3.config import CONFIG_NAME, IA3Config
from ia3.errors import IA3Error

from . import KEY
from .adapter import IA3Adapter, Place, check_complete, read_folder, scales_of
from .index import SlotIndex
from .layers import Scaled, layer_classes, move_into_activation
from .memory import PREFIX, Memory
from .options import Options
from .resolver import kind_of

# Checkpoints whose fused projection has its heads in turns, as vLLM's own model does not: a vector would need them too.
INTERLEAVED = frozenset({"gpt_neox", "bloom", "falcon", "RefinedWeb", "RefinedWebModel"})


class IA3ModelManager(LRUCacheLoRAModelManager):
    """Slots of vectors in a model's layers."""

    def __init__(self, *arguments: Any, vllm_config: Any, **named: Any) -> None:
        configured = vllm_config.model_config
        kinds = [configured.hf_text_config.model_type, configured.hf_config.model_type]
        self.options = Options.of(vllm_config.additional_config[KEY], kinds)
        self.places: dict[str, Place] = {}
        self._kinds, self._dtype, self._given = kinds, configured.dtype, vllm_config.lora_config
        self._runs_eagerly = vllm_config.compilation_config.mode == CompilationMode.NONE
        super().__init__(*arguments, vllm_config=vllm_config, **named)
        missing = [name for name, module in self.model.named_modules() if isinstance(module, PPMissingLayer)]
        self._elsewhere = tuple(f"{name}." for name in missing)
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        self._mapper = mapper and mapper.get_rename_mapper()

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        made: dict[Any, SlotIndex] = {}  # several parts of a model may share one
        for name, wrapper in self.punica_wrapper_mapping.items():
            if wrapper not in made:
                made[wrapper] = SlotIndex(len(wrapper._token_lora_indices), self.device)
                if self.options.with_lora:
                    made[wrapper].join(wrapper)
            if not self.options.with_lora:
                self.punica_wrapper_mapping[name] = made[wrapper]

    def _create_lora_modules(self) -> None:
        wanted = dict(self._targets())
        if not wanted:
            raise IA3Error(
                "no layer of this model has a name that ends with one of "
                f"{[*self.options.outputs, *self.options.inputs]}; start the server with what `ia3 vllm-args` prints."
            )
        config = self.lora_config = copy.copy(self._given)
        if not self.options.with_lora:
            config.target_modules = sorted(wanted)
        elif config.target_modules is not None:
            config.target_modules = sorted({*config.target_modules, *wanted})
        known = utils._all_lora_classes
        utils._all_lora_classes = (*layer_classes(self.options.with_lora), *known)
        try:
            super()._create_lora_modules()
        finally:
            utils._all_lora_classes = known
        for module, paths in wanted.items():
            layer = self.modules.get(module)
            if not isinstance(layer, Scaled):
                kind = type(self.model.get_submodule(module)).__name__
                raise IA3Error(f"{module} is a {kind}, which cannot be scaled; leave it out of the targets.")
            sides = [self.options.sides(path) for path in paths]
            layer.create_tables(module, [side[0] for side in sides], [side[1] for side in sides], self.options.dtype)
            for part, (path, side) in enumerate(zip(paths, sides, strict=True)):
                self.places[path] = Place(module, part, *side)
            if self._runs_eagerly and self.device.type == "cpu" and not layer.is_split:
                move_into_activation(self.model.get_submodule(module.rpartition(".")[0]), layer, self._dtype)

    def _targets(self) -> Any:
        """Yield the modules that have something to scale, with the checkpoint's names of the layers in them."""
        for module, layer in self.model.named_modules():
            if not isinstance(layer, LinearBase) or self._get_punica_wrapper(module) is None:
                continue  # the second: of a part that vLLM adapts nothing in
            parent, _, own = module.rpartition(".")
            fused = self.packed_modules_mapping.get(own) or [own]
            paths = [f"{parent}.{name}" if parent else name for name in fused]
            if not any(any(self.options.sides(path)) for path in paths):
                continue
            if len(fused) == 1 and isinstance(layer, QKVParallelLinear) and INTERLEAVED.intersection(self._kinds):
                raise IA3Error(
                    f"{module} is one fused projection of a {self._kinds[0]} checkpoint, whose heads are interleaved "
                    "otherwise than here; serve it with --model-impl transformers, or merged."
                )
            yield module, paths

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> Any:
        if self.options.with_lora:
            return super().create_dummy_lora(lora_id, rank, embedding_modules)
        return IA3Adapter(lora_id, {})

    def _add_adapter(self, lora: Any) -> None:
        if isinstance(lora, IA3Adapter):
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        is_new: bool = super().activate_adapter(lora_id)
        adapter = self._registered_adapters[lora_id]
        if is_new and isinstance(adapter, IA3Adapter):
            slot = self.lora_index_to_id.index(lora_id)
            for module, (output, inputs) in adapter.scales.items():
                self.modules[module].set_scales(slot, output, inputs)
        return is_new

    def read(self, adapter_id: int, source: str, tensors: Mapping[str, Tensor], config: IA3Config | None) -> IA3Adapter:
        """Return an adapter of these tensors. Raises :class:`IA3Error` for what does not fit the model."""
        if not tensors:
            raise IA3Error(f"{source} holds no vectors; save the adapter again.")
        names: set[str] = set()

        def rename(path: str) -> str | None:
            name = path
            if self._mapper is not None:
                name = (self._mapper._map_name(f"{path}.weight") or path).removesuffix(".weight")
            names.add(name)
            return None if name.startswith(self._elsewhere) else name

        scales = scales_of(source, tensors, self.places, self.modules, rename)
        if config is not None:
            check_complete(source, config, names, self.places)
        return IA3Adapter(adapter_id, scales)


class IA3WorkerManager(LRUCacheWorkerLoRAManager):
    """One worker's adapters, from folders and from memory."""

    _manager_cls = IA3ModelManager

    def __init__(self, vllm_config: Any, device: torch.device, *arguments: Any, **named: Any) -> None:
        if vllm_config.lora_config.fully_sharded_loras:
            raise IA3Error("--fully-sharded-loras splits LoRA's matrices, and IA3 has none to split; leave it out.")
        super().__init__(vllm_config, device, *arguments, **named)
        self.memory = Memory(lambda source, tensors: self._adapter_manager.read(1, source, tensors, None))

    def _load_adapter(self, lora_request: LoRARequest) -> Any:
        path = lora_request.lora_path
        if path.startswith(PREFIX):
            return self._adapter_manager.read(lora_request.lora_int_id, path, self.memory.find(path), None)
        folder = Path(get_adapter_absolute_path(path))
        if not (folder / CONFIG_NAME).is_file():
            raise LoRAAdapterNotFoundError(lora_request.lora_name, path)
        if self._adapter_manager.options.with_lora and kind_of(folder) == "LORA":
            return super()._load_adapter(lora_request)
        config, tensors = read_folder(folder)
        return self._adapter_manager.read(lora_request.lora_int_id, str(folder), tensors, config)

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        # A request that was loaded in place keeps saying so with every batch: its files were read then, once.
        requests = {copy.copy(request) for request in lora_requests}
        for request in requests:
            request.load_inplace = False
        super()._apply_adapters(requests)
