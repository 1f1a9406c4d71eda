"""How long a text of a model can be, as its config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.adapters.base import Adapter

ASSUMED_CONTEXT = 2048
"""Tokens of a text where the config names no length, as for rotary positions without a limit."""


def context_length(config: Mapping[str, Any], adapter: Adapter) -> int | None:
    """Return the longest text in tokens, None if the config does not say."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or isinstance(positions, bool):
        return None
    if adapter.positions_after_pad:
        pad = config.get("pad_token_id")
        positions -= (pad if isinstance(pad, int) else 1) + 1
    return positions


def too_many_new(new: int, context: int | None, config: Mapping[str, Any]) -> str | None:
    """Say that no text of this model can have so many new tokens, None if one could.

    A prompt that leaves less room than there is may still be written on from, with a warning; but
    what is longer than any text of the context by itself is a mistake, and takes for ever. Where
    the config asks for positions that stretch with the text (dynamic NTK), there is no such end.

    Args:
        new: Tokens to write.
        context: Longest text of the model in tokens, None if it names none.
        config: config.json.
    """
    rotary = config.get("rope_parameters") or config.get("rope_scaling")
    if context is None or new < context or "dynamic" in str(rotary):
        return None
    return (
        f"max_new_tokens is {new:,}, and the context of this model is {context:,} tokens, those of "
        f"the prompt among them: write at most {max(context - 1, 1):,}"
    )
