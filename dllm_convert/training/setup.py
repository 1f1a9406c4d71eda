"""Load a converted checkpoint for training and choose what is trainable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dllm_convert import modeling
from dllm_convert.adapters.base import Adapter
from dllm_convert.schema import Training


def load_model(folder: Path, adapter: Adapter, *, dtype: torch.dtype = torch.float32) -> Any:
    """Load the diffusion class of a checkpoint folder, in evaluation mode.

    Args:
        folder: Converted checkpoint.
        adapter: Its family.
        dtype: Type the weights are held in.
    """
    cls = getattr(modeling, adapter.diffusion_class)
    model = cls.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def training_dtype(training: Training) -> torch.dtype:
    """Type the weights are trained in.

    Full training keeps float32 weights under bf16 autocast: pure bf16 loses updates smaller than
    1/256 of a weight. Frozen weights under LoRA need no such care where memory is scarce.
    """
    if training.method == "lora" and torch.cuda.is_available() and use_bf16(training):
        return torch.bfloat16
    return torch.float32


def use_bf16(training: Training) -> bool:
    """Whether to autocast to bfloat16: where the hardware multiplies it natively."""
    if training.precision != "auto":
        return training.precision == "bf16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def make_trainable(model: Any, adapter: Adapter, training: Training) -> Any:
    """Prepare the model for the recipe's method.

    With LoRA (arXiv 2106.09685) the normalisation layers and the embeddings, or at least the mask's
    row, stay trainable: without them a conversion does not learn what the mask means.

    Args:
        model: Diffusion model.
        adapter: Its family.
        training: Method and LoRA settings.

    Returns:
        The model, or a PEFT model around it.
    """
    if training.method == "full":
        return model
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    lora = training.lora
    saved = list(adapter.norm_modules) if lora.norms else []
    tied = model.config.tie_word_embeddings
    rows = None
    if lora.embeddings == "full":
        saved += (
            [adapter.embedding_module] if tied else [adapter.embedding_module, adapter.head_module]
        )
    else:
        rows = {adapter.embedding_module: [model.config.mask_token_id]}
    # PEFT ties what it knows by name; the heads of encoders it does not know.
    tie = tied and lora.embeddings == "full"
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=list(adapter.lora_targets),
        modules_to_save=saved or None,
        trainable_token_indices=rows,
        ensure_weight_tying=tie and adapter.embedding_module in EMBEDDING_LAYER_NAMES,
    )
    wrapped = get_peft_model(model, config)
    if tie and not config.ensure_weight_tying:
        trained = model.get_input_embeddings().modules_to_save[wrapped.active_adapter]
        model.get_output_embeddings().weight = trained.weight
    return wrapped


def count_trainable(model: Any) -> int:
    """Number of parameters that receive gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
