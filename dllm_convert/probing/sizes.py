"""Sizes of the small instance, by the names transformers' configs give them.

A name that is not known here is recognised by its value, if that is the hidden size or another
width of the same model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 64, 4, 16, 96, 173
"""Widths of the small instance; no two are equal, and the vocabulary is no multiple of any, so that
a tensor's shape tells what it belongs to."""
WINDOW = 6
"""Positions a window is cut down to: far below the length of the texts that are measured."""

_LEFT_ALONE = re.compile(
    r".*(_token_id|max_position|position_embeddings|n_positions|n_ctx|max_seq|theta|seed|_index|"
    r"kernel|conv_L|_d_conv|num_labels|pretraining_tp|chunk_size_feed_forward|expand|type_vocab|"
    r"max_length|_floor|floor_scale|round_up|multiple_of|scalar|num_mtp|nextn|dim_model_base)\w*"
)
_WINDOWS = re.compile(
    r"(sliding_window|window_size|attention_chunk_size|keep_window_size|local_attention|index_topk|"
    r"local_attention_window_len|attention_window_size|\w*_attn_chunk_length|rel_extent)"
)
PERIODS = re.compile(
    r"(\w*_period|\w*_interval|_?sliding_window_pattern|global_attn_every_n_layers|"
    r"decoder_sparse_step|interleave_moe_layer_step|layer_group_size|num_layers_per_stack)"
)
"""Fields that say after how many layers a pattern begins anew."""

Sizes = Mapping[str, Any]
_FIXED: Mapping[str, int] = {
    "hidden_size": HIDDEN,
    "embedding_size": HIDDEN,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "o_lora_rank": 8,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": 8,
    "qk_head_dim": HEAD_DIM + 8,
    "v_head_dim": HEAD_DIM,
    "rotary_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": HEAD_DIM,
    "n_shared_experts": 1,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_heads": 2 * HIDDEN // 16,
    "mamba_num_heads": 2 * HIDDEN // 16,
    "mamba_d_ssm": 2 * HIDDEN,
    "n_mamba_heads": 8,
    "mamba_headdim": 16,
    "linear_num_heads": HEADS,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "router_hidden_size": 32,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "d_rel": 8,
    "gated_norm_rank": 8,
    "adapter_rank": 8,
    "lru_width": HIDDEN,
    "attention_hidden_size": HIDDEN,
}
_AT_MOST: Mapping[str, int] = {
    "topk_group": 1,
    "n_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_kv_shared_layers": 1,
    "hc_mult": 2,
    "o_groups": 2,
    "index_topk_blocks": 2,
    "index_block_size": 4,
    "num_random_blocks": 1,
    "block_size": 8,
}
_FAMILIES_OF_NAMES: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"\w*(experts_per_tok(en)?|topk|top_k\w*|moe_k|experts_per_token)"), 2),
    (
        re.compile(r"\w*(num_experts|num_local_experts|routed_experts|expert_num|moe_num_experts)"),
        4,
    ),
    (re.compile(r"\w*(state_size|d_state|chunk_size)"), 8),
    (re.compile(r"\w*(time_step_rank|dt_rank|n_groups|ngroups)"), 1),
    (re.compile(r"\w*(intermediate|ffn|dff|n_inner|feed_forward|dim_ff)\w*"), INTERMEDIATE),
    (re.compile(r"(linear_)\w*head_dim"), HEAD_DIM),
)


def small_number(name: str, value: int, sizes: Sizes) -> int:
    """Return a size of the small instance.

    Args:
        name: Name of the field.
        value: What it is in the original.
        sizes: All fields of the original.
    """
    if value == 0 or PERIODS.fullmatch(name) or name == "no_rope_layers":
        return value
    if _WINDOWS.fullmatch(name):
        return min(value, WINDOW)
    if name in _FIXED:
        return _FIXED[name]
    if name in _AT_MOST:
        return min(value, _AT_MOST[name])
    if name in _COMPUTED:
        return _COMPUTED[name](value, sizes)
    if _LEFT_ALONE.fullmatch(name):
        return value
    for pattern, size in _FAMILIES_OF_NAMES:
        if pattern.fullmatch(name):
            return min(value, size)
    return _by_value(value, sizes)


def _by_value(value: int, sizes: Sizes) -> int:
    """Shrink a number whose name says nothing, if it is a width of the same model."""
    widths = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "head_dim": HEAD_DIM}
    for name, small in {**widths, "num_attention_heads": HEADS}.items():
        if value > HEADS and value == sizes.get(name):
            return small
    return value


def _key_value_heads(value: int, sizes: Sizes) -> int:
    """Keep the sharing as it was: every head its own, one for all, or some heads each."""
    heads = sizes.get("num_attention_heads")
    return HEADS if value == heads else 1 if value == 1 else 2


def _head_dim(value: int, sizes: Sizes) -> int:
    if value == sizes.get("qk_rope_head_dim"):
        return 8
    return HEAD_DIM + 8 if value == sizes.get("qk_head_dim") else HEAD_DIM


_COMPUTED: Mapping[str, Callable[[int, Sizes], int]] = {
    "num_key_value_heads": _key_value_heads,
    "num_kv_heads": _key_value_heads,
    "swa_num_key_value_heads": _key_value_heads,
    "head_dim": _head_dim,
    "num_heads": lambda value, sizes: 2 * HIDDEN // HEAD_DIM if "state_size" in sizes else HEADS,
}
