"""What a server may be told under this package's key in ``--additional-config``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ia3.errors import IA3Error

from . import KEY

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """The choices of one engine.

    outputs, inputs: ends of the names of the layers, as the checkpoint calls them, whose output or input is scaled.
    dtype: of the vectors in the layers' memory; products are fp32 all the same.
    with_lora: serve LoRA adapters beside, which costs their memory and their kernels in every layer.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    with_lora: bool = False

    @classmethod
    def of(cls, given: Any, model_types: Iterable[str]) -> Options:
        """Read ``true`` or ``{"outputs": […], "inputs": […], "dtype": "float32", "lora": false}``, all optional.

        model_types: the first that PEFT has defaults for settles what is scaled where nothing is named.
        Raises :class:`IA3Error`.
        """
        given = {} if given is True else given
        if not isinstance(given, Mapping):
            raise IA3Error(f'--additional-config has {{"{KEY}": {given!r}}}; expected true or an object: correct it.')
        unknown = sorted(given.keys() - {"outputs", "inputs", "dtype", "lora"})
        if unknown:
            raise IA3Error(
                f'--additional-config has {unknown[0]!r} under "{KEY}"; expected outputs, inputs, dtype or lora.'
            )
        dtype, with_lora = given.get("dtype", "float32"), given.get("lora", False)
        if dtype not in list(DTYPES) or not isinstance(with_lora, bool):
            raise IA3Error(
                f'--additional-config has dtype {dtype!r} and lora {with_lora!r} under "{KEY}"; expected one of '
                f"{', '.join(DTYPES)}, and true or false: correct it."
            )
        names = {side: given.get(side, []) for side in ("outputs", "inputs")}
        for side, value in names.items():
            if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
                raise IA3Error(
                    f'--additional-config has {side} {value!r} under "{KEY}"; expected a list of ends of layers\' '
                    'names, as in ["self_attn.k_proj"]: correct it.'
                )
        if not any(names.values()):
            names = _defaults(list(model_types))
        return cls(tuple(names["outputs"]), tuple(names["inputs"]), DTYPES[dtype], with_lora)

    def sides(self, path: str) -> tuple[bool, bool]:
        """Return whether the output and the input of the layer at ``path`` are scaled."""
        ends = f".{path}".endswith
        return any(ends(f".{name}") for name in self.outputs), any(ends(f".{name}") for name in self.inputs)


def _defaults(model_types: list[str]) -> dict[str, list[str]]:
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    for kind in model_types:
        if kind in TARGETS:
            inputs = list(FEEDFORWARD.get(kind, ()))
            return {"outputs": [name for name in TARGETS[kind] if name not in inputs], "inputs": inputs}
    raise IA3Error(
        f"there are no default targets for the model type {model_types[0]!r}; name the layers in --additional-config: "
        f'{{"{KEY}": {{"outputs": ["k_proj", "v_proj"], "inputs": ["down_proj"]}}}}, or let `ia3 vllm-args` do it.'
    )
