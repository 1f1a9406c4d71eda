"""How long a text may be: what a model has positions for, and what it was trained on."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

_BESIDE = 4
"""Rows that a table of positions may have beside those of its context, as RoBERTa's and OPT's."""


class ContextError(ValueError):
    """A text is longer than the table of learnt positions: there is nothing to look up."""


class ContextWarning(UserWarning):
    """A text is longer than the context: rotary positions go on, where nothing was trained."""


def context_of(model: Any) -> int | None:
    """Return the longest text in tokens that a model's config names, None if it names none."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - int(getattr(model, "_first_position", 0))


def has_position_table(model: Any) -> bool:
    """Whether positions are looked up in a table as long as the context, as an encoder's are."""
    positions, words = int(model.config.max_position_embeddings), model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not words
        and 0 <= module.num_embeddings - positions <= _BESIDE
        for module in model.modules()
    )


def check_context(model: Any, lengths: list[int], new: int, block_size: int | None) -> None:
    """Look whether the longest prompt and the new tokens, in whole blocks, fit into the context.

    Raises a ContextError if not and positions are looked up in a table; else it warns.
    """
    longest = max(lengths, default=0)
    context, total = context_of(model), longest + new
    blocks = -(-total // block_size) * block_size if block_size else total
    if context is None or blocks <= context:
        return
    told = f"a prompt of {longest} tokens and {new} new ones are {total}"
    if has_position_table(model):
        whole = f", {blocks} in whole blocks of {block_size}" if blocks > total else ""
        raise ContextError(
            f"{told}{whole}, and this model has positions for {context}: shorten the prompt, or "
            "write fewer tokens"
        )
    if total > context:
        warnings.warn(
            f"{told}, more than the context of {context} this model was trained on",
            ContextWarning,
            stacklevel=4,
        )
