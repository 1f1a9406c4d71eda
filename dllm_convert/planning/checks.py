"""Checks of a checkpoint and a recipe that need headers and config only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.recipe.schema import Generation, Recipe
from dllm_convert.source.context import too_many_new


def layer_count(config: Mapping[str, Any]) -> int:
    """Return the number of layers.

    Raises:
        IncompatibleError: The config does not give a positive number.
    """
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise IncompatibleError(
            f"config.json: num_hidden_layers is {layers!r}, expected a whole number of at least 1"
        )
    return layers


def check_target(recipe: Recipe, adapter: Adapter) -> None:
    """Check that the family converts to the target.

    Raises:
        UnsupportedError: It does not.
    """
    if recipe.training.keeps_base and adapter.behind is not None:
        return
    if not adapter.targets:
        raise UnsupportedError(
            f"{adapter.model_type} was measured to convert beside a base that stays as it is, and "
            "in no other way",
            hint="--to bd3lm --block 32 --lora 64 --keep-base",
        )
    if recipe.target not in adapter.targets and adapter.measured is not None:
        raise UnsupportedError(
            f"{adapter.model_type} was measured to convert to {' or '.join(adapter.targets)}, not "
            f"to {recipe.target}",
            hint=f"Use --to {adapter.targets[0]}; check --probe shows what was measured",
        )
    if recipe.target not in adapter.targets:
        raise UnsupportedError(
            f"{adapter.model_type} converts to {' or '.join(adapter.targets)}, not "
            f"{recipe.target}: it was trained to see both sides of every token, so there is no "
            "causal pass over earlier blocks that block diffusion could keep",
            hint=f"Use --to {adapter.targets[0]}",
        )


def check_context(recipe: Recipe, context: int | None, config: Mapping[str, Any]) -> None:
    """Check that a recipe's lengths fit the context.

    Args:
        recipe: The resolved recipe.
        context: Longest text of the model in tokens, None if it names none.
        config: config.json.

    Raises:
        IncompatibleError: They do not.
    """
    block, length = recipe.block_size, recipe.data.sequence_length
    if block is not None and context is not None and block > context:
        raise IncompatibleError(
            f"block size {block} is larger than the model's context of {context} tokens",
            hint=f"Use a block of at most {context}; 16 to 64 is usual",
        )
    if context is not None and length > context:
        raise IncompatibleError(
            f"data.sequence_length {length} is larger than the model's context of {context} tokens",
            hint=f"--set data.sequence_length={context}",
        )
    new = recipe.generation.max_new_tokens
    long = too_many_new(new, context, config)
    if long and new != Generation().max_new_tokens:
        what, _, advice = long.partition(": ")
        raise IncompatibleError(f"generation.{what}", hint=advice.capitalize())
