"""A conversion that keeps its base: what it needs, and the little that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.common.terms import Behind, Draft
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.planning.attention import AttentionPlan, layer_types
from dllm_convert.planning.layers import SLIDING, group_layers, kept_features
from dllm_convert.planning.mask_token import MaskTokenDecision
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.info import SourceInfo

_MERGED = "Leave --keep-base out: then the adapter is merged into the weights"


def check_kept_base(source: SourceInfo, adapter: Adapter) -> None:
    """Check that a base can read clean tokens as it is, beside an adapter on noisy ones.

    Raises:
        UnsupportedError: Its family cannot.
        IncompatibleError: It is no base any more, or has a window, or ids without a row.
    """
    if adapter.attention != "causal":
        raise UnsupportedError(
            f"{adapter.model_type} reads both sides of every token; --keep-base needs a base that "
            "predicts the next one from those before it",
            hint=_MERGED,
        )
    if adapter.behind is None:
        raise UnsupportedError(
            f"{adapter.model_type} was measured, and does not go on from its cache as it would "
            "from the text, which --keep-base needs",
            hint=f"`check --probe` shows what was measured. {_MERGED}",
        )
    if diffusion_section(source.config) is not None:
        raise IncompatibleError(
            "the source is a diffusion model already, so there is no autoregressive base to keep",
            hint=f"Take the model it was converted from. {_MERGED}",
        )


def behind_of(config: Mapping[str, Any], adapter: Adapter) -> Behind:
    """Say how noisy tokens stand behind clean ones: by a mask, unless one would open a window."""
    if adapter.behind == "cache" or SLIDING in layer_types(config, adapter):
        return "cache"
    return "mask"


def draft_of(recipe: Recipe, config: Mapping[str, Any], adapter: Adapter) -> Draft:
    """Say whom a noisy token sees of its block: what the recipe asks for, else all it can.

    Raises:
        IncompatibleError: It asks for open blocks, and attention stays closed.
    """
    asked = recipe.block_attention
    if not recipe.training.keeps_base or behind_of(config, adapter) == "mask":
        return "open" if asked == "auto" else asked
    if asked == "open":
        raise IncompatibleError(
            f"block_attention=open, and the attention of this {adapter.model_type} stays as it "
            "is: noisy tokens see what stands before them",
            hint="Leave block_attention out",
        )
    return "causal"


def kept_attention(recipe: Recipe, source: SourceInfo, adapter: Adapter) -> AttentionPlan:
    """Say what becomes of the attention: nothing for clean tokens."""
    config = source.config
    kinds = layer_types(config, adapter)
    if draft_of(recipe, config, adapter) == "causal":
        whom, after = "those before them in their", "causal, noisy tokens too"
    else:
        whom, after = "the others of their", "causal, open among the noisy tokens of a block"
    change = (
        f"clean tokens keep the base's causal attention; noisy ones also see {whom} block of "
        f"{recipe.block_size}"
    )
    notes = list(kept_features(source))
    if behind_of(config, adapter) == "cache":
        notes.append(
            "no attention is opened: noisy tokens stand behind a copy of the base's cache, in rows "
            "of their own"
        )
    narrow = adapter.measured.narrow if adapter.measured else ()
    layers = group_layers(
        kinds,
        before="causal",
        after=after,
        window=config.get("sliding_window"),
        windowed={SLIDING, *narrow},
    )
    return AttentionPlan((change,), {}, tuple(notes), layers)


def without_row(mask: MaskTokenDecision) -> MaskTokenDecision:
    """Return the decision for a base whose embedding is not touched: a vector stands for the mask.

    Raises:
        IncompatibleError: The tokenizer has ids without a row, and the embedding may not grow.
    """
    if mask.tokenizer_size > mask.rows_before:
        raise IncompatibleError(
            f"the tokenizer has ids up to {mask.tokenizer_size - 1}, the embedding "
            f"{mask.rows_before} rows, and --keep-base adds none",
            hint=_MERGED,
        )
    reason = mask.reason
    if mask.id >= mask.rows_before:
        reason = f"no row is free, and none is needed: its id lies past the {mask.rows_before} rows"
    return replace(mask, reason=reason, write_row=False, rows_after=mask.rows_before)
