"""Loading what the user names: a base model with its tokenizer (a folder or a GGUF file), and an adapter on it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import timeit
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.markup import escape

from ..errors import IA3Error, reason_of
from ..files import open_file, read_model_config
from .options import AUTO

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """Where a model lies: a folder in transformers' format, or a GGUF file inside one."""

    folder: Path
    gguf_file: str | None = None

    @property
    def path(self) -> Path:
        """Return the model's place, as one path."""
        return self.folder / self.gguf_file if self.gguf_file else self.folder

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for transformers' `from_pretrained`, which never asks the network."""
        return {"local_files_only": True} | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def require(purpose: str, **packages: bool) -> None:
    """Raise IA3Error with what to type if some of the packages that `purpose` needs now are missing: all at once."""
    needed = [package for package, is_needed in packages.items() if is_needed]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise IA3Error(f"{purpose} needs packages that are not installed; type `pip install {' '.join(missing)}`.")


def locate(path: Path) -> Source:
    """Check, without loading anything, that `path` looks like a model. Raises IA3Error if not.

    The source is absolute: an adapter that is trained on it names its base by it.
    """
    path = path.absolute()
    if not os.path.exists(path):
        raise IA3Error(f"{path} does not exist; MODEL is a model folder or a .gguf file on this machine.")
    if not path.is_dir():
        return _locate_gguf(path)
    for found in path.iterdir():
        if not found.is_file() and not found.is_dir():  # transformers opens whatever has the right name
            raise IA3Error(f"{found} is a device, a FIFO, or a link that leads nowhere; take it away.")
    if os.path.lexists(path / "config.json"):
        read_model_config(path / "config.json")
        return Source(path)
    if os.path.lexists(path / "adapter_config.json"):
        raise IA3Error(f"{path} is an adapter, not a model; name its base model and pass the folder by --adapter.")
    raise IA3Error(f"{path} has no config.json, so it is no model folder; name one, or a .gguf file.")


def _locate_gguf(path: Path) -> Source:
    try:
        with open_file(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise IA3Error(f"{path} cannot be read: {error.strerror}; name a model folder or a .gguf file.") from error
    if magic != b"GGUF":
        raise IA3Error(f"{path} is not a GGUF file (it does not begin with GGUF); name a model folder or a .gguf file.")
    return Source(path.parent, path.name)


def pick_device(name: str) -> str:
    """Return `cuda` or `cpu` for one of DEVICES. Raises IA3Error if CUDA was asked for and is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise IA3Error("--device cuda was asked for, but torch finds no CUDA device; leave it out or use --device cpu.")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def pick_dtype(name: str, device: str) -> torch.dtype:
    """Return the dtype of that name; for `auto` the one that computes fastest on this machine, fp32 or bf16.

    Measured, since neither a processor's name nor its instructions tell it: where bf16 has no instructions, some of
    torch's bf16 products take nine times as long as in fp32. bf16 takes half the memory, so it wins unless it is
    clearly slower.
    """
    import torch

    from ia3_kernels import scaled_linear

    if name != AUTO:
        return cast("torch.dtype", getattr(torch, name))
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32

    def seconds(dtype: torch.dtype) -> float:
        # A layer of a small model, and attention, which torch computes: forward and backward, as in a training step.
        x = torch.ones(256, 768, dtype=dtype, requires_grad=True)
        weight, scale = torch.ones(768, 768, dtype=dtype), torch.ones(768)

        def step() -> None:
            y = scaled_linear(x, weight, None, None, scale).view(1, 256, 12, 64).transpose(1, 2)
            torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).sum().backward()

        return min(timeit.repeat(step, number=1, repeat=4))

    return torch.float32 if seconds(torch.bfloat16) > 1.25 * seconds(torch.float32) else torch.bfloat16


def check_kernels(device: str) -> None:
    """Raise IA3Error for a word in the environment that means nothing here, or asks for a backend that cannot run."""
    import torch

    from ia3_kernels import explain

    with _sentence("no kernel can run"):
        explain("scaled_linear", device=device, dtype=torch.bfloat16)


def load_for(job: Any, source: Source, stderr: Console) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load what is at `source` as the --device, --dtype and --load-in-4bit of a command ask for it."""
    device = pick_device(job.device)
    check_kernels(device)
    dtype = pick_dtype(job.dtype, device)
    with stderr.status(escape(f"loading {source.path}")):
        return load(source, dtype, device, job.load_in_4bit)


def load(
    source: Source, dtype: torch.dtype, device: str, four_bit: bool = False
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the tokenizer and the causal language model at `source`, its weights in `dtype` or in 4 bits.

    A GGUF file's weights are unpacked. Raises IA3Error if they cannot be loaded, lack something or do not fit together.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Of a GGUF file AutoTokenizer parses everything in Python, 3 s for 50,000 tokens, to learn the name of this class.
    kind: Any = PreTrainedTokenizerFast if source.gguf_file else AutoTokenizer
    with _sentence(f"the tokenizer of {source.path} cannot be loaded"):
        tokenizer: Any = kind.from_pretrained(str(source.folder), **source.arguments())
    if not tokenizer.get_vocab():
        raise IA3Error(f"{source.path} has no tokenizer; put tokenizer.json and tokenizer_config.json beside it.")
    if tokenizer.pad_token_id is None:  # any will do, since what it fills is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model = _load_model(source, dtype, device, four_bit)
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise IA3Error(f"the tokenizer has ids up to {highest:,}, but the model embeds {rows:,}; use the model's own.")
    return tokenizer, model


def _load_model(source: Source, dtype: torch.dtype, device: str, four_bit: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig

    arguments = source.arguments()
    if source.gguf_file:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    elif four_bit:
        arguments["device_map"] = {"": device}  # packed weights are made where they stay
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model: Any
    with _sentence(f"the model {source.path} cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(source.folder), dtype=dtype, output_loading_info=True, **arguments
        )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random ones
        what = f"{len(missing)} of the model's weights, {missing[0]} among them"
        raise IA3Error(f"{source.path} lacks {what}; get the whole model.")
    return model.eval() if four_bit else model.to(device).eval()


def load_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """Return `model` with the adapter in `folder` on it. Raises IA3Error if the adapter is broken or does not fit."""
    from .. import PeftModel

    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise IA3Error(f"the adapter {folder} {what}; --adapter is the folder that `ia3 finetune` or PEFT wrote.")
    warn_if_merged(model, folder)
    with _sentence(f"the adapter {folder} cannot be loaded"):
        return PeftModel.from_pretrained(model, str(folder))


def warn_if_merged(model: PreTrainedModel, folder: Path) -> None:
    """Warn if the adapter in `folder` was merged into the model's weights already, as its configuration tells."""
    from ..checkpoint import read_tensors
    from ..merging.checkpoint import digest

    merged = getattr(model.config, "ia3_merged_adapters", None)
    if isinstance(merged, dict) and digest(read_tensors(folder)) in merged:
        warnings.warn(f"the adapter {folder} is in this model's weights already, so it acts twice.", stacklevel=2)


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """Raise IA3Error if `length` tokens (`what`, for the message) are more than the model has positions for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise IA3Error(f"{what} is {length:,} tokens, but the model takes at most {limit:,}; make it shorter.")


@contextlib.contextmanager
def _sentence(problem: str) -> Iterator[None]:
    """Turn a failure inside into an IA3Error that begins with `problem`: if loading fails, the files are at fault."""
    try:
        yield
    except (IA3Error, MemoryError):
        raise
    except Exception as error:
        raise IA3Error(f"{problem}: {reason_of(error)}") from error
