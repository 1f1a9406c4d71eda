"""Numbers and flags of config.json, checked before anything is computed or built with them.

Everything here was written by somebody else. What a class would refuse later, or what would make
this tool reserve memory for layers that no file holds, is refused here, in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.tensors import ClassTensors
from dllm_convert.common.counts import LARGEST_COUNT
from dllm_convert.common.shown_text import shown
from dllm_convert.errors import IncompatibleError
from dllm_convert.source.config_parts import check_parts

LARGEST = LARGEST_COUNT
"""Largest size of a tensor, and longest context, that is believed."""
MOST_LAYERS = 10_000
"""Most layers that are believed where no header says how many there are."""
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_FLAGS = (
    *("tie_word_embeddings", "use_sliding_window", "is_decoder", "add_cross_attention"),
    *("is_encoder_decoder", "output_attentions", "output_hidden_states", "use_cache"),
)
_OPTIONAL = ("sliding_window", "max_window_layers", "head_dim", "num_key_value_heads")
_OVER_ZERO = ("rope_theta",)
_LABELS, _MOST_LABELS = "num_labels", 1_000_000
"""transformers makes a name for each label, used or not: gigabytes from one number."""
_CHUNKS = "chunk_size_feed_forward"
_NOT_NEGATIVE = ("rms_norm_eps", "layer_norm_eps", "initializer_range")
_SHARES = ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
_ID_ENDS = ("_token_id", "_token_ids")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_SINGLE_IDS = ("bos_token_id", "pad_token_id", "sep_token_id")


def wrong(
    key: str,
    value: object,
    expected: str,
    hint: str | None = None,
    *,
    file: str = "config.json",
) -> IncompatibleError:
    """Return the error for a field of config.json that is not what it has to be."""
    return IncompatibleError(
        f"{file}: {key} is {shown(value)}, expected {expected}",
        hint=hint or f"Correct it, or take the {file} that belongs to these weights",
    )


def is_size(value: object) -> bool:
    """Whether a value is a whole number of at least 1 and no larger than is believed."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def is_id(value: object) -> bool:
    """Whether a value can be the id of a token."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 2.0**1023
        and math.isfinite(value)
    )


def check_numbers(config: Mapping[str, Any], adapter: Adapter | None, tensors: int) -> None:
    """Check every number and flag that a plan, the class or a cost is computed from.

    Args:
        config: config.json.
        adapter: The family; None where it is still to be measured, which reads its own fields.
        tensors: Number of tensors in the files, 0 if that is not known.

    Raises:
        IncompatibleError: One is no such number.
    """
    _check_layers(config, tensors)
    check_ids(config)
    declared = adapter.tensors if adapter is not None else None
    context = config.get("max_position_embeddings")
    if context is not None and not is_size(context):
        raise wrong("max_position_embeddings", context, f"a whole number from 1 to {LARGEST}")
    if declared is None:
        huge = next((k for k, v in config.items() if isinstance(v, int) and abs(v) >= 2**63), None)
        if huge is not None:
            raise wrong(huge, config[huge], "a number of at most 64 bits")
        return
    for key in (*declared.defaults, *_OPTIONAL):
        if key in config:
            _check_size(key, config[key], declared)
    for key in (*_FLAGS, *declared.flagged):
        if key in config and not isinstance(config[key], bool):
            raise wrong(key, config[key], "true or false")
    _check_reals(config)
    if config.get(_CHUNKS) not in (None, 0, 1) or isinstance(config.get(_CHUNKS), bool):
        # Texts whose length is no multiple of it do not run.
        raise wrong(_CHUNKS, config[_CHUNKS], "0", "Leave it out: it only saves memory")
    causal = adapter is not None and adapter.attention == "causal"
    _check_heads(config, declared, causal=causal)
    check_parts(config, rotary=_head_width(config, declared) // 2 if causal else None)


def check_ids(content: Mapping[str, Any], file: str = "config.json") -> None:
    """Check that every field that names tokens by their ids does so; below 0 stands for none.

    Args:
        content: config.json or generation_config.json.
        file: Its name.

    Raises:
        IncompatibleError: A field holds something else.
    """
    for key, value in content.items():
        if not (key.endswith(_ID_ENDS) or key in _ID_LISTS):
            continue
        # Classes take one id of these alone.
        single = file == "config.json" and key in _SINGLE_IDS
        ids = value if isinstance(value, list) and not single else [value]
        if not all(
            token is None or (type(token) is int and abs(token) <= LARGEST) for token in ids
        ):
            several = "" if single else " or a list of ids"
            raise wrong(key, value, f"the id of a token{several}, or null", file=file)


def check_padding(config: Mapping[str, Any], rows: int) -> None:
    """Check that the padding token has a row: without it the class is not even built.

    Args:
        config: config.json.
        rows: Rows of the output's embedding.

    Raises:
        IncompatibleError: It has none.
    """
    pad = config.get("pad_token_id")
    if pad is None:
        return
    whole = isinstance(pad, int) and not isinstance(pad, bool)
    if not whole or not -rows <= pad < rows:
        raise wrong(
            "pad_token_id",
            pad,
            f"an id below the {rows} rows of the embedding, or null",
        )


def _check_layers(config: Mapping[str, Any], tensors: int) -> None:
    most = tensors or MOST_LAYERS
    for key in _LAYER_KEYS:
        value = config.get(key)
        if value is None and key not in config:
            continue
        if not is_size(value):
            raise wrong(key, value, "a whole number of at least 1")
        if not isinstance(value, int) or value > most:
            held = f"the files hold {tensors} tensors" if tensors else f"at most {MOST_LAYERS:,}"
            raise wrong(key, value, f"as many layers as the weights have ({held})")


def _check_size(key: str, value: object, declared: ClassTensors) -> None:
    lowest = 0 if key == "max_window_layers" else 1
    if value is None and (key in declared.nullable or key == "sliding_window"):
        return
    if value is None and key not in declared.defaults:
        # An attribute of its own to the class, which would compute with it.
        if key != "head_dim":
            return
        raise wrong(key, value, "a whole number", "Leave it out: the class computes it")
    if value == 0 and lowest == 0 and not isinstance(value, bool):
        return
    if not is_size(value):
        raise wrong(key, value, f"a whole number from {lowest} to {LARGEST}")


def _check_reals(config: Mapping[str, Any]) -> None:
    labels = config.get(_LABELS)
    if labels is not None and labels != 0 and not (is_size(labels) and labels <= _MOST_LABELS):
        raise wrong(_LABELS, labels, f"a whole number up to {_MOST_LABELS}")
    for key in (*_OVER_ZERO, *_NOT_NEGATIVE, *_SHARES):
        value = config.get(key)
        if value is None:
            continue
        if not is_number(value) or value < 0 or (key in _OVER_ZERO and value == 0):
            raise wrong(key, value, "a number above 0" if key in _OVER_ZERO else "a number from 0")
        if key in _SHARES and value > 1:
            raise wrong(key, value, "a number from 0 to 1")
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise wrong(key, value, "an object or null")
        for name in ("factor", "rope_theta"):
            number = value.get(name) if value else None
            if number is not None and (not is_number(number) or number <= 0):
                raise wrong(f"{key}.{name}", number, "a number above 0")


def _size(config: Mapping[str, Any], declared: ClassTensors, key: str) -> int:
    value = config.get(key)
    return int(value if value is not None else declared.defaults.get(key) or 0)


def _head_width(config: Mapping[str, Any], declared: ClassTensors) -> int:
    given = _size(config, declared, "head_dim")
    heads, hidden = (_size(config, declared, k) for k in ("num_attention_heads", "hidden_size"))
    return given or hidden // heads


def _check_heads(config: Mapping[str, Any], declared: ClassTensors, *, causal: bool) -> None:
    heads, groups, hidden = (
        _size(config, declared, key)
        for key in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if declared.heads_divide and hidden % heads:
        raise wrong("num_attention_heads", heads, f"a divisor of hidden_size {hidden}")
    if not causal:
        return
    if config.get("num_key_value_heads", 0) is not None and groups and heads % groups:
        raise wrong("num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}")
    width = _head_width(config, declared)
    if width < 1 or width % 2:
        named = (
            "head_dim"
            if _size(config, declared, "head_dim")
            else "hidden_size / num_attention_heads"
        )
        raise wrong(named, width, "an even number: rotary positions turn pairs")
