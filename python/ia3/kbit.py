"""``prepare_model_for_kbit_training``: a (quantized) base model made ready for adapters to be trained in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# The names of the methods, as transformers notes them in a model, whose layers compute in 16 bits.
_KEEPS_16_BIT = frozenset({"gptq", "aqlm", "eetq", "torchao", "hqq"})


def _quantization(model: nn.Module) -> str | None:
    """The name of the method by which transformers quantized ``model``, or ``None``."""
    if getattr(model, "hqq_quantized", False):
        return "hqq"
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _is_bitsandbytes(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze ``model`` and hold its 16-bit parameters (norms, embeddings, heads) in fp32; returns ``model``.

    They stay 16-bit where the quantized layers want them so (GPTQ, AQLM, EETQ, HQQ, torchao). A quantized model gets
    gradient checkpointing too, reentrant unless told otherwise, and then embeddings whose output requires a gradient:
    reentrant checkpoints pass gradients only to inputs that want them. All of this is what PEFT's function does.

    use_gradient_checkpointing: whether a quantized model gets it; a model that is not quantized never does.
    gradient_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``, such as ``{"use_reentrant": False}``.
    auto_clear_cache: give the memory of the 16-bit copies back to the accelerator.
    """
    model.requires_grad_(False)
    method = _quantization(model)
    if method not in _KEEPS_16_BIT:
        for parameter in model.parameters():
            # bitsandbytes may store its packed 4-bit values in a 16-bit dtype.
            if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    if use_gradient_checkpointing and (method in _KEEPS_16_BIT or _is_bitsandbytes(model)):
        _checkpoint(model, gradient_checkpointing_kwargs or {})
    return model


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    # Reentrant is what PEFT's function leaves torch to choose; torch wants to be told.
    options = {"use_reentrant": True, **options}
    # The newer name first: the older one warns that it will go.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    if options["use_reentrant"]:
        require_input_gradients(model)


def require_input_gradients(model: Any) -> None:
    """Let the embeddings' output require a gradient: reentrant checkpoints pass gradients to inputs that want them."""
    if getattr(model, "_require_grads_hooks", None):
        return  # transformers has set the hooks itself for most models; a second set would never be removed
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)
