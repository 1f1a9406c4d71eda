"""Shrink a config: few layers of every kind and small widths, with every switch as it was."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from dllm_convert.probing.sizes import HEAD_DIM, PERIODS, VOCABULARY, Sizes, small_number

MAX_PERIOD = 12
"""Longest period of a layer pattern that is built whole."""
PER_KIND = 2
"""Layers of each kind."""

_NUMBERS_OF_LAYERS = re.compile(r"(?!no_rope)\w*(layers|idxs|layer_ids)")
"""Lists of numbers of layers, as opposed to lists with an entry for every layer."""


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
        if PERIODS.fullmatch(key) and isinstance(value, int) and 1 < value <= MAX_PERIOD
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
    if isinstance(value, Mapping) and name == "per_layer_config":
        each = {int(key): inner for key, inner in value.items()}
        kept = {str(new): each[old] for new, old in enumerate(layers) if old in each}
        return {key: _smaller("config", kept[key], sizes, layers, count) for key in kept}
    if isinstance(value, Mapping) and name.endswith("config"):
        return {key: _smaller(key, inner, sizes, layers, count) for key, inner in value.items()}
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return small_number(name, value, sizes)


def _listed(
    name: str, value: list[Any], sizes: Sizes, layers: Sequence[int], count: int
) -> list[Any]:
    if name.endswith("_token_id"):
        return [token % 4 + 4 * place for place, token in enumerate(value)]
    if name == "attention_types":
        return [[value[0][0], max(1, len(layers) // len(value[0][0]))]]
    if len(value) == count and not _numbers_of_layers(name, value):
        return [
            small_number(name, value[k], sizes) if type(value[k]) is int else value[k]
            for k in layers
        ]
    if _numbers_of_layers(name, value):
        return [new for new, old in enumerate(layers) if old in value]
    return value


def _numbers_of_layers(name: str, value: list[Any]) -> bool:
    numbers = all(type(entry) is int for entry in value)
    return bool(_NUMBERS_OF_LAYERS.fullmatch(name)) and numbers and len(set(value)) == len(value)


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
