"""ConversionPlan: everything a run will do, as one printable value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dllm_convert.adapters.base import Adapter
from dllm_convert.schema import Recipe
from dllm_convert.source import SourceInfo

MaskRule = Literal["tokenizer", "recipe", "padded-row", "reserved", "grow"]


@dataclass(frozen=True)
class MaskTokenDecision:
    """Which id becomes the mask and how its embedding row is made.

    Attributes:
        token: Text of the token.
        id: Row of the embedding.
        rule: Which rule of `mask_token.py` chose it.
        reason: The same in words, for the plan and the card.
        new: Whether the tokenizer must learn the token.
        write_row: Whether the row is overwritten with the mean of the used rows.
        used_rows: Rows 0..used_rows-1 enter the mean.
        rows_before: Rows of the embedding in the source.
        rows_after: Rows of the embedding in the output.
    """

    token: str
    id: int
    rule: MaskRule
    reason: str
    new: bool
    write_row: bool
    used_rows: int
    rows_before: int
    rows_after: int


@dataclass(frozen=True)
class ConversionPlan:
    """Everything a run will do.

    Attributes:
        recipe: The resolved recipe.
        source: The checkpoint, seen through its headers.
        adapter: The family's declaration.
        mask: The mask-token decision.
        attention_changes: One sentence per change to the attention.
        config_updates: Keys written into config.json; None removes the key.
        tensors_changed: Names of tensors whose bytes will differ before training.
        warnings: Sentences the user should read before starting.
    """

    recipe: Recipe
    source: SourceInfo
    adapter: Adapter
    mask: MaskTokenDecision
    attention_changes: tuple[str, ...]
    config_updates: Mapping[str, Any]
    tensors_changed: tuple[str, ...]
    warnings: tuple[str, ...]
