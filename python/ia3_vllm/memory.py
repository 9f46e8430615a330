"""Adapters from memory: a trainer hands vectors to a running engine, without a file.

Each version has a path of its own, ``ia3-memory:NAME@VERSION``, and vLLM tells prefix blocks apart by their adapter's
path: keys and values of an older version are never read for a newer one.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ia3.errors import IA3Error

PREFIX = "ia3-memory:"


class Memory:
    """The newest vectors of each name, in one worker."""

    def __init__(self, check: Callable[[str, Mapping[str, Tensor]], object]) -> None:
        self._check, self._newest = check, dict[str, dict[str, Tensor]]()
        self._versions: dict[str, int] = {}

    def put(self, name: str, data: bytes | str) -> str:
        """Keep an adapter's tensors, after a check that they fit the model; returns the path of this version.

        data: of a safetensors file, or the same in base64. Raises :class:`IA3Error`, and keeps what was there.
        """
        try:
            tensors = load(base64.b64decode(data, validate=True) if isinstance(data, str) else bytes(data))
        except (SafetensorError, ValueError, KeyError) as error:
            raise IA3Error(f"the vectors given for {name!r} are no safetensors data: {error}.") from None
        version = self._versions.get(name, 0) + 1
        path = f"{PREFIX}{name}@{version}"
        self._check(path, tensors)
        self._newest[name], self._versions[name] = tensors, version
        return path

    def find(self, path: str) -> dict[str, Tensor]:
        """Return the newest tensors of a path's name, which a request of an older version reads as well."""
        name = path.removeprefix(PREFIX).rpartition("@")[0]
        if name not in self._newest:
            raise IA3Error(f"no vectors were given for {name!r}, or they were dropped; push them again.")
        return self._newest[name]

    def drop(self, name: str) -> None:
        """Forget an adapter's tensors; the engine's copy in a slot stays until it is evicted or removed."""
        self._newest.pop(name, None)


class WorkerExtension:
    """What ``--worker-extension-cls ia3_vllm.WorkerExtension`` adds to vLLM's workers, for ``collective_rpc``."""

    def ia3_push(self, name: str, data: bytes | str) -> str:
        """Keep an adapter's tensors (see :meth:`Memory.put`); returns the path to load it by."""
        return _memory(self).put(name, data)

    def ia3_drop(self, name: str) -> None:
        """Forget an adapter's tensors."""
        _memory(self).drop(name)


def _memory(worker: Any) -> Memory:
    memory = getattr(getattr(worker.model_runner, "lora_manager", None), "memory", None)
    if not isinstance(memory, Memory):
        raise IA3Error("this engine has no IA3 adapters; start it with what `ia3 vllm-args` prints.")
    return memory


def push(llm: Any, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """Hand an adapter's vectors to a running ``vllm.LLM``; returns the ``LoRARequest`` to generate with.

    name: of the adapter; a name that was pushed before gets new vectors, also for requests of it that still run.
    tensors: by their keys in a file, as ``peft.get_peft_model_state_dict`` returns them.

    Raises what the engine raised where the vectors do not fit, and changes nothing then.
    """
    request = _request(name, llm.collective_rpc("ia3_push", args=(name, pack(tensors)))[0])
    llm.llm_engine.add_lora(request)
    return request


async def async_push(engine: Any, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """Hand an adapter's vectors to a running ``AsyncLLM``; as :func:`push`."""
    request = _request(name, (await engine.collective_rpc("ia3_push", args=(name, pack(tensors))))[0])
    await engine.add_lora(request)
    return request


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return an adapter's tensors as one message: the bytes of a safetensors file."""
    return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})


def _request(name: str, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    # Any number that is no other adapter's: servers count from 1, and some of vLLM keeps it in 32 bits.
    number = (1 << 30) | zlib.crc32(name.encode()) >> 2
    return LoRARequest(name, number, path, load_inplace=True)
