"""Shrink a config: few layers of every kind and small widths, with every switch as it was.

Sizes are recognised by the names transformers' configs give them; a name it does not know is
recognised by its value, if that is the hidden size or another width of the same model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 64, 4, 16, 96, 173
"""Widths of the small instance; no two are equal, and the vocabulary is no multiple of any, so that
a tensor's shape tells what it belongs to."""
WINDOW = 6
"""Positions a window is cut down to: far below the length of the texts that are measured."""
MAX_PERIOD = 12
"""Longest period of a layer pattern that is built whole."""
PER_KIND = 2
"""Layers of each kind."""

_LEFT_ALONE = re.compile(
    r".*(_token_id|max_position|position_embeddings|n_positions|n_ctx|max_seq|theta|seed|_index|"
    r"kernel|conv_L|_d_conv|num_labels|pretraining_tp|chunk_size_feed_forward|expand|type_vocab|"
    r"max_length|_floor|floor_scale|round_up|multiple_of|scalar|num_mtp|nextn|dim_model_base)\w*"
)
_WINDOWS = re.compile(
    r"(sliding_window|window_size|attention_chunk_size|keep_window_size|local_attention|index_topk|"
    r"local_attention_window_len|attention_window_size|\w*_attn_chunk_length|rel_extent)"
)
_NUMBERS_OF_LAYERS = re.compile(r"(?!no_rope)\w*(layers|idxs|layer_ids)")
"""Lists of numbers of layers, as opposed to lists with an entry for every layer."""
_PERIODS = re.compile(
    r"(\w*_period|\w*_interval|_?sliding_window_pattern|global_attn_every_n_layers|"
    r"decoder_sparse_step|interleave_moe_layer_step|layer_group_size|num_layers_per_stack)"
)

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
    "num_kv_shared_layers": 0,
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


@dataclass(frozen=True)
class Small:
    """A shrunken config.

    Attributes:
        config: The config.
        layers: Which layers of the original it keeps, in their order.
        kinds: Kind of each kept layer, in words.
    """

    config: PreTrainedConfig
    layers: tuple[int, ...]
    kinds: tuple[str, ...]


def standard_names(config: PreTrainedConfig) -> dict[str, str]:
    """Return what a config calls its own fields: its name to the name all models share."""
    return {own: shared for shared, own in config.attribute_map.items()}


def shrink(config: PreTrainedConfig) -> Small:
    """Shrink a config of a decoder.

    Args:
        config: Config of a real checkpoint, or a family's default.
    """
    values = config.to_dict()
    names = standard_names(config)
    sizes = {names.get(key, key): value for key, value in values.items()}
    for shared, own in config.attribute_map.items():
        sizes.setdefault(shared, getattr(config, own, None))
    count = int(config.num_hidden_layers)
    kinds = _kinds(values, count)
    layers = _chosen_layers(values, kinds)
    for key, value in values.items():
        name = names.get(key, key)
        if name in ("num_hidden_layers", "num_layers"):
            values[key] = len(layers)
        else:
            values[key] = _smaller(name, value, sizes, layers, count)
    for key in (
        "architectures",
        "dtype",
        "quantization_config",
        "auto_map",
        "id2label",
        "label2id",
    ):
        values.pop(key, None)
    small = CONFIG_MAPPING[config.model_type].from_dict(values)
    chosen = tuple(kinds[layer] if layer < len(kinds) else kinds[-1] for layer in layers)
    return Small(small, layers, chosen)


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Name the kind of every layer of a config."""
    return _kinds(config.to_dict(), int(config.num_hidden_layers))


def _per_layer(values: Sizes, count: int) -> dict[str, Sequence[Any]]:
    """Return the fields that hold one entry per layer."""
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, list) and len(value) == count and not _numbers_of_layers(key, value)
    }


def _kinds(values: Sizes, count: int) -> list[str]:
    """Name each layer by what the config says of it; equal names are equal layers."""
    lists = _per_layer(values, count)
    dense = int(values.get("first_k_dense_replace") or values.get("num_dense_layers") or 0)
    only = values.get("mlp_only_layers") or ()
    kinds = []
    for layer in range(count):
        words = [_word(key, value[layer]) for key, value in sorted(lists.items())]
        if "mlp_layer_types" not in lists and (layer < dense or layer in only):
            words.append("dense")
        kinds.append(", ".join(word for word in words if word) or "decoder")
    return kinds


def _word(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{key} {value}" if isinstance(value, int) and value < 2 else ""


def _chosen_layers(values: Sizes, kinds: Sequence[str]) -> tuple[int, ...]:
    if len(set(kinds)) > 1:
        # A layer may read what an earlier one left behind (shared indexers, for instance).
        taken: dict[str, int] = {}
        chosen = []
        for layer, kind in enumerate(kinds):
            if taken.setdefault(kind, 0) < PER_KIND:
                taken[kind] += 1
                chosen.append(layer)
        return tuple(chosen)
    periods = [
        value
        for key, value in values.items()
        if _PERIODS.fullmatch(key) and isinstance(value, int) and 1 < value <= MAX_PERIOD
    ]
    return tuple(range(min(len(kinds), max([PER_KIND, *periods]))))


def _smaller(name: str, value: Any, sizes: Sizes, layers: Sequence[int], count: int) -> Any:
    """Return a field of the small config."""
    if value is None:
        return None
    if name in ("rope_parameters", "rope_scaling", "rope_scaling_dict"):
        return _rope(value, sizes)
    if isinstance(value, list):
        return _listed(name, value, sizes, layers, count)
    if name.endswith("_token_id") or name.endswith("_index"):
        return value % 4 if isinstance(value, int) and value >= VOCABULARY else value
    if isinstance(value, Mapping) and name.endswith("config"):
        same = {key: _smaller(key, inner, sizes, layers, count) for key, inner in value.items()}
        return _renumbered(same, layers) if name == "per_layer_config" else same
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return _number(name, value, sizes)


def _listed(
    name: str, value: list[Any], sizes: Sizes, layers: Sequence[int], count: int
) -> list[Any]:
    if name.endswith("_token_id"):
        return [token % 4 + 4 * place for place, token in enumerate(value)]
    if name == "attention_types":
        return [[value[0][0], max(1, len(layers) // len(value[0][0]))]]
    if len(value) == count and not _numbers_of_layers(name, value):
        return [
            _number(name, value[k], sizes) if type(value[k]) is int else value[k] for k in layers
        ]
    if _numbers_of_layers(name, value):
        return [new for new, old in enumerate(layers) if old in value]
    return value


def _numbers_of_layers(name: str, value: list[Any]) -> bool:
    numbers = all(type(entry) is int for entry in value)
    return bool(_NUMBERS_OF_LAYERS.fullmatch(name)) and numbers and len(set(value)) == len(value)


def _renumbered(value: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    kept = {int(key): inner for key, inner in value.items()}
    return {str(new): kept[old] for new, old in enumerate(layers) if old in kept}


def _number(name: str, value: int, sizes: Sizes) -> int:
    if value == 0 or _PERIODS.fullmatch(name) or name == "no_rope_layers":
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


def _rope(value: Any, sizes: Sizes) -> Any:
    """Keep a rotary variant; factors per frequency are cut or drawn out to the small head."""
    if not isinstance(value, Mapping):
        return value
    dim = 8 if "qk_rope_head_dim" in sizes else HEAD_DIM
    share = value.get("partial_rotary_factor", sizes.get("partial_rotary_factor")) or 1.0
    frequencies = int(dim * share) // 2
    small: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            small[key] = _rope(inner, sizes)
        elif key in ("short_factor", "long_factor"):
            small[key] = [*inner, *[inner[-1]] * frequencies][:frequencies]
        elif key == "mrope_section":
            part = frequencies // len(inner)
            small[key] = [frequencies - part * (len(inner) - 1), *[part] * (len(inner) - 1)]
        else:
            small[key] = inner
    return small
