"""LLaDA: OLMo's names and config; as published (8B) it computes what Llama does.

Source: arXiv 2502.09992 and the modelling file published with the weights. Each block is
`attn_norm`, `q_proj`, `k_proj`, `v_proj`, `attn_out`, then `ff_norm` and `ff_out(silu(ff_proj) *
up_proj)`: Llama's block by other names, with the same halves in the rotary embedding. OLMo has
other kinds of block, norm and bias, which the config can switch on; then nothing is mapped.

LLaDA-MoE and LLaDA 2 have experts: their headers and tokens are read, no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.verification.foreign.layout import ForeignLayout

_BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
_PARTS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
_OFF = (False, None)
# Defaults of LLaDA's own config class, for keys that may be absent.
_DEFAULTS: Mapping[str, Any] = {
    "d_model": 768,
    "mlp_ratio": 4,
    "n_heads": 12,
    "n_layers": 12,
    "max_sequence_length": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "weight_tying": True,
}


def _stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    full = {**_DEFAULTS, **config}
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "torch_dtype", "dtype")
    return {
        **{key: config[key] for key in kept if key in config},
        "hidden_size": full["d_model"],
        "intermediate_size": full.get("mlp_hidden_size") or full["mlp_ratio"] * full["d_model"],
        "num_hidden_layers": full["n_layers"],
        "num_attention_heads": full["n_heads"],
        "num_key_value_heads": full.get("n_kv_heads") or full["n_heads"],
        "max_position_embeddings": full["max_sequence_length"],
        "vocab_size": full.get("embedding_size") or full.get("vocab_size"),
        "rms_norm_eps": full["rms_norm_eps"],
        "rope_theta": full["rope_theta"],
        "tie_word_embeddings": full["weight_tying"],
        "hidden_act": "silu",
    }


LAYOUTS = (
    ForeignLayout(
        name="LLaDA",
        model_types=("llada",),
        architectures=("LLaDAModelLM",),
        family="llama",
        mask_text="<|mdm_mask|>",
        requires={
            "block_type": ("llama",),
            "layer_norm_type": ("rms",),
            "activation_type": ("silu",),
            "rope": (True,),
            "block_group_size": (1, None),
            "layer_norm_with_affine": (True, None),
            **dict.fromkeys(("alibi", "include_bias", "include_qkv_bias"), _OFF),
            **dict.fromkeys(("bias_for_layer_norm", "attention_layer_norm"), _OFF),
            **dict.fromkeys(("input_emb_norm", "scale_logits", "multi_query_attention"), _OFF),
        },
        stock_config=_stock_config,
        renames={
            r"^model\.transformer\.wte\.": "model.embed_tokens.",
            r"^model\.transformer\.ln_f\.": "model.norm.",
            r"^model\.transformer\.ff_out\.": "lm_head.",
            **{
                rf"{_BLOCK}{part}\.": rf"model.layers.\1.{stock}." for part, stock in _PARTS.items()
            },
        },
        embedding="model.transformer.wte.weight",
    ),
    ForeignLayout(
        name="LLaDA-MoE",
        model_types=("llada", "lladamoe"),
        architectures=("LLaDAMoEModel", "LLaDAMoEModelLM"),
        mask_text="<|mask|>",
    ),
    ForeignLayout(
        name="LLaDA 2",
        model_types=("llada2_moe",),
        mask_text="<|mask|>",
        embedding="model.word_embeddings.weight",
        blocks="always",
        default_block_size=32,
        block_mask="4d",
    ),
)
