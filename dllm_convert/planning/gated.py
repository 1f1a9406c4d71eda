"""A conversion that keeps its base: what it needs, and the little that it changes."""

from __future__ import annotations

from dataclasses import replace

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.common.terms import Draft
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
    if adapter.measured is not None:
        raise UnsupportedError(
            f"{adapter.model_type} was measured, not written, and --keep-base has been tried with "
            "families that have an adapter",
            hint=_MERGED,
        )
    if diffusion_section(source.config) is not None:
        raise IncompatibleError(
            "the source is a diffusion model already, so there is no autoregressive base to keep",
            hint=f"Take the model it was converted from. {_MERGED}",
        )
    if SLIDING in layer_types(source.config, adapter):
        raise IncompatibleError(
            f"the base has a sliding window of {source.config.get('sliding_window')} tokens, which "
            "--keep-base would have to open",
            hint=_MERGED,
        )


def draft_of(recipe: Recipe, adapter: Adapter) -> Draft:
    """Say whom a noisy token sees of its block: what the recipe asks for, else all of it."""
    asked = recipe.training.lora.draft
    return "open" if asked == "auto" else asked


def kept_attention(recipe: Recipe, source: SourceInfo, adapter: Adapter) -> AttentionPlan:
    """Say what becomes of the attention: nothing for clean tokens."""
    kinds = layer_types(source.config, adapter)
    if draft_of(recipe, adapter) == "causal":
        whom, after = "those before them in their", "causal, noisy tokens too"
    else:
        whom, after = "the others of their", "causal, open among the noisy tokens of a block"
    change = (
        f"clean tokens keep the base's causal attention; noisy ones also see {whom} block of "
        f"{recipe.block_size}"
    )
    layers = group_layers(kinds, before="causal", after=after)
    return AttentionPlan((change,), {}, kept_features(source), layers)


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
