"""Loading what the user names: a base model with its tokenizer (a folder or a GGUF file), and an adapter on it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import IA3Error

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .. import IA3Model

GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Source:
    """Where a model lies: a folder in transformers' format, or a GGUF file inside one."""

    folder: Path
    gguf_file: str | None = None

    @property
    def path(self) -> Path:
        """What the user named."""
        return self.folder / self.gguf_file if self.gguf_file else self.folder

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' `from_pretrained`, which never asks the network."""
        arguments: dict[str, Any] = {"local_files_only": True}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        return arguments


def require(package: str, purpose: str) -> None:
    """Raises IA3Error with what to type if `package`, which only `purpose` needs, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise IA3Error(f"{purpose} needs {package}, which is not installed; type `pip install {package}`.")


def locate(path: Path) -> Source:
    """Checks, without loading anything, that `path` looks like a model. Raises IA3Error if not."""
    if not path.exists():
        raise IA3Error(f"{path} does not exist; MODEL is a model folder or a .gguf file on this machine.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise IA3Error(
                    f"{path} is an adapter, not a model; name its base model and pass the folder by --adapter."
                )
            raise IA3Error(f"{path} has no config.json, so it is no model folder; name one, or a .gguf file.")
        return Source(path)
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise IA3Error(f"{path} cannot be read: {error.strerror}.") from error
    if magic != GGUF_MAGIC:
        raise IA3Error(
            f"{path} is not a GGUF file (it does not begin with 'GGUF'); name a model folder or a .gguf file."
        )
    require("gguf", "reading a GGUF file")
    return Source(path.parent, path.name)


def pick_device(name: str) -> str:
    """`cuda` or `cpu` for one of DEVICES. Raises IA3Error if CUDA was asked for and is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise IA3Error("--device cuda was asked for, but torch finds no CUDA device; leave it out or use --device cpu.")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def check_kernels(device: str, dtype: torch.dtype) -> None:
    """Raises IA3Error if the backend that the environment asks for by name cannot run."""
    from ia3_kernels import explain

    with _sentence("no kernel can run"):
        explain("scaled_linear", device=device, dtype=dtype)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises IA3Error if there is none, or an empty one."""
    from transformers import AutoTokenizer

    with _sentence(f"the tokenizer of {source.path} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(str(source.folder), **source.arguments())
    if not tokenizer.get_vocab():
        raise IA3Error(
            f"{source.path} has no tokenizer; put its tokenizer.json and tokenizer_config.json beside the weights."
        )
    return tokenizer


def load_model(source: Source, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The causal language model at `source` with its parameters in `dtype`, on `device`, in evaluation mode.

    A GGUF file's weights are unpacked. Raises IA3Error if the model cannot be loaded or lacks some of its weights.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    arguments = source.arguments()
    if source.gguf_file:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
        require("accelerate", "loading a GGUF file")
    with _sentence(f"the model {source.path} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(source.folder), dtype=dtype, output_loading_info=True, **arguments
        )
    model, info = loaded
    if info["missing_keys"]:  # transformers would go on with random ones
        missing = sorted(info["missing_keys"])
        raise IA3Error(
            f"{source.path} lacks {len(missing)} of the model's weights, {missing[0]} among them; get the whole model."
        )
    model.to(device).eval()
    return cast("PreTrainedModel", model)


def load_adapter(model: PreTrainedModel, folder: Path) -> IA3Model:
    """`model` with the adapter in `folder` on it. Raises IA3Error if the adapter is broken or does not fit."""
    from .. import IA3Model

    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise IA3Error(f"the adapter {folder} {what}; --adapter is the folder that `ia3 finetune` or PEFT wrote.")
    check_kernels(model.device.type, model.dtype)
    with _sentence(f"the adapter {folder} cannot be loaded"):
        return IA3Model.from_pretrained(model, str(folder))


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up short sequences; any will do, since what it fills is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises IA3Error if the tokenizer has ids that the model has no embedding for."""
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise IA3Error(
            f"the tokenizer has ids up to {highest:,}, but the model's embedding has {rows:,} rows; "
            "use the tokenizer that belongs to the model."
        )


def check_length(model: PreTrainedModel | IA3Model, length: int, what: str) -> None:
    """Raises IA3Error if `length` tokens (`what`, for the message) are more than the model has positions for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise IA3Error(f"{what} is {length:,} tokens, but the model takes at most {limit:,}; make it shorter.")


@contextlib.contextmanager
def _sentence(problem: str) -> Iterator[None]:
    """Turns a failure inside into an IA3Error that begins with `problem`: if loading fails, the files are at fault."""
    try:
        yield
    except (IA3Error, MemoryError):
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise IA3Error(f"{problem}: {first}") from error
