"""LLaDA2's layout with every layer dense: Llama, Mistral, Qwen2 and Qwen3 for SGLang and MLX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dllm_convert.planning.layouts.target import (
    MLX_VLM,
    SGLANG,
    Converted,
    Refusal,
    Target,
    common_config,
    config_class,
    decoded_by_blocks,
    families,
    mask_row_is_free,
    sglang_files,
)

_MASK, _ROWS = 156895, 157184
"""Hard-coded in SGLang 0.5.23; mlx-vlm reads the config."""
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_RENAMED = {
    "embed_tokens": "word_embeddings",
    "self_attn.q_proj": "attention.query_key_value",
    "self_attn.k_proj": "attention.query_key_value",
    "self_attn.v_proj": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
}


def _refusals(converted: Converted) -> Iterator[Refusal]:
    yield from families(_FAMILIES, "this layout has the layers of Llama's relatives", converted)
    yield from decoded_by_blocks(converted)
    biased = [end for end in ("o_proj.bias", "up_proj.bias", "q_proj.bias") if converted.has(end)]
    if biased and biased != ["q_proj.bias"]:
        yield Refusal(
            f"it has biases ({', '.join(biased)}), and the engine adds none but those of queries, "
            "keys and values",
            "No export of it is right; sample it with dllm-convert",
        )
    yield from mask_row_is_free(_MASK, converted)


def _config(converted: Converted, rows: int, mask: int) -> dict[str, Any]:
    layers = converted.config["num_hidden_layers"]
    return common_config(converted, rows, mask) | {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
        # Every layer comes before the first with experts.
        "first_k_dense_replace": layers,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "num_shared_experts": 0,
        "moe_intermediate_size": converted.config["intermediate_size"],
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "output_router_logits": False,
        "use_qk_norm": converted.has("self_attn.q_norm.weight"),
        "use_qkv_bias": converted.has("self_attn.q_proj.bias"),
        "use_bias": False,
        "use_rmsnorm": True,
        "norm_head": False,
        "norm_softmax": False,
        "partial_rotary_factor": 1.0,
        "rotary_dim": converted.head_dim,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "max_window_layers": layers,
        "use_sliding_window": False,
        "sliding_window": None,
        # mlx-vlm's own default is a row that this tokenizer need not have.
        "pad_token_id": _pad(converted.config),
    }


def _pad(config: Mapping[str, Any]) -> int | None:
    if config.get("pad_token_id") is not None:
        return int(config["pad_token_id"])
    end = config.get("eos_token_id")
    return end[0] if isinstance(end, list) else end


def _names(name: str) -> str:
    for old, new in _RENAMED.items():
        if f".{old}." in name:
            return name.replace(f".{old}.", f".{new}.")
    return name


TARGET = Target(
    name="llada2",
    engines=("SGLang", "mlx-vlm"),
    summary="LLaDA2 with every layer dense, block diffusion",
    refusals=_refusals,
    config=_config,
    names=_names,
    mask_row=_MASK,
    rows=_ROWS,
    may_untie=True,
    files=lambda converted: {
        "configuration_llada2_moe.py": config_class("LLaDA2MoeConfig", "llada2_moe"),
        **sglang_files(converted),
    },
    launch=(SGLANG, MLX_VLM),
)
