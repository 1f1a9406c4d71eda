"""Tiny checkpoints of families that nobody wrote an adapter for, and their measured adapters."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from factory import CONTEXT, TOKENIZERS
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dllm_convert.probing.family import measure_family
from dllm_convert.probing.report import ProbeReport
from dllm_convert.source.folder import read_config
from dllm_convert.source.safetensors_header import read_checkpoint

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_KINDS = ["sliding_attention", "full_attention"]
_WINDOWED = {"sliding_window": 4, "layer_types": _KINDS, "head_dim": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    # Windows, soft-caps on attention (so no sdpa) and logits, norms around everything.
    "gemma2": {**_WINDOWED, "query_pre_attn_scalar": 8},
    # The kind of a layer decides on its rotary base too.
    "gemma3_text": {**_WINDOWED, "query_pre_attn_scalar": 8},
    # Full layers have no positions at all.
    "cohere2": {**_WINDOWED},
    "olmo2": {},
    # One matrix for q, k and v; per-frequency rotary factors for long texts.
    "phi3": {
        "pad_token_id": 1,
        "original_max_position_embeddings": CONTEXT // 2,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 1.5, 2.0, 4.0],
        },
    },
    # Embeddings, residuals, attention and logits are scaled.
    "granite": {
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    },
    # Parallel attention and MLP, a rotary part of each head, a file that calls its head otherwise.
    "gpt_neox": {},
    # Experts, which its file holds one by one and its class together.
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    # Learnt positions, and names of its own for every size.
    "gpt2": {"n_embd": 32, "n_head": 4, "n_inner": 64, "n_positions": CONTEXT, "n_layer": 2},
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2},
}
"""Family to the fields of its tiny config."""
CLOSED: dict[str, dict[str, Any]] = {
    # Convolutions, and attention here and there.
    "lfm2": {"layer_types": ["conv", "full_attention"], "head_dim": 8},
    # A recurrent state.
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
"""The same of families whose attention nobody opens, and whose base can stay."""


def make_generic(folder: Path, model_type: str, **fields: Any) -> Path:
    """Write a tiny checkpoint with its tokenizer and return `folder`."""
    tokenizer = TOKENIZERS["llama"]()
    shared = {} if model_type in ("gpt2", "mamba") else {"num_hidden_layers": 2, **_DECODER}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    values = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        **ids,
        **shared,
        **{**CONFIGS, **CLOSED}[model_type],
        **fields,
    }
    config = CONFIG_MAPPING[model_type](**values)
    torch.manual_seed(0)
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("Test licence: do as you like.\n")
    return folder


@cache
def measured(folder: Path) -> ProbeReport:
    """Measure the family of a tiny checkpoint, once."""
    entries = [e for header in read_checkpoint(folder).values() for e in header.entries.items()]
    stored = {name: (entry.dtype, entry.shape) for name, entry in entries}
    return measure_family(read_config(folder), stored)
