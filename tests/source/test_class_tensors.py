"""What an adapter declares of its class's tensors is what the class holds, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dllm_convert.adapters import Adapter, all_adapters, get_adapter
from dllm_convert.adapters.tensors import sizes_of

ALL = all_adapters()
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 40,
    "type_vocab_size": 3,
    "pad_token_id": 1,
}
DECODER_VARIANTS: list[dict[str, Any]] = [
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 1, "head_dim": 16},
    {"num_key_value_heads": 4, "head_dim": 6},
    {"num_key_value_heads": 2, "attention_bias": True},
    {"num_key_value_heads": 2, "mlp_bias": True},
    {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    {"num_key_value_heads": 2, "tie_word_embeddings": True},
    {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8},
]
ENCODER_VARIANTS: list[dict[str, Any]] = [
    {},
    {"type_vocab_size": 1},
    {"tie_word_embeddings": False},
    {"hidden_size": 40, "num_attention_heads": 8},
]


def variants(adapter: Adapter) -> list[dict[str, Any]]:
    """Return configs to try: those of the shape, and every default of the class on its own."""
    assert adapter.tensors is not None
    shaped = DECODER_VARIANTS if adapter.attention == "causal" else ENCODER_VARIANTS
    found = [SMALL | variant for variant in shaped]
    base = SMALL | ({"num_key_value_heads": 2} if adapter.attention == "causal" else {})
    for key in adapter.tensors.defaults:
        if key not in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
            found.append({name: value for name, value in base.items() if name != key})
    return [*found, *(base | {key: None} for key in adapter.tensors.nullable)]


def held(adapter: Adapter, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the class's own tensors, built without memory."""
    cls = getattr(transformers, adapter.stock_class)
    with torch.device("meta"):
        model = cls(cls.config_class.from_dict(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_the_declaration_is_the_class(adapter: Adapter) -> None:
    declared = adapter.tensors
    assert declared is not None
    for config in variants(adapter):
        sizes = sizes_of(declared, config)
        flags = {flag: bool(config.get(flag, False)) for flag in declared.flagged}
        names = declared.names(sizes["num_hidden_layers"], flags)
        found = {name: tuple(sizes[size] for size in shape) for name, shape in names.items()}
        assert found == held(adapter, config), config


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_defaults_are_those_of_the_config_class(adapter: Adapter) -> None:
    assert adapter.tensors is not None
    config = getattr(transformers, adapter.stock_class).config_class()
    for key, value in adapter.tensors.defaults.items():
        assert getattr(config, key) == value, key
    for flag in adapter.tensors.flagged:
        assert getattr(config, flag) is False


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_prefix_and_ties_are_the_classs(adapter: Adapter) -> None:
    assert adapter.tensors is not None
    cls = getattr(transformers, adapter.stock_class)
    assert adapter.tensors.prefix == cls.base_model_prefix
    biases = adapter.head_biases
    ties = {adapter.head: adapter.embedding} | {other: biases[0] for other in biases[1:]}
    assert cls._tied_weights_keys == ties


def test_a_family_that_is_measured_declares_none() -> None:
    assert all(adapter.tensors is not None for adapter in ALL)
    assert get_adapter("llama").unused_tensors is None
