"""Checks of a checkpoint and a recipe that need headers and config only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.recipe.schema import Generation, Recipe
from dllm_convert.source.context import too_many_new
from dllm_convert.source.info import SourceInfo


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


def check_pickle(source: SourceInfo, *, allowed: bool) -> None:
    """Check that pickled weights were asked for.

    Raises:
        IncompatibleError: The weights are pickles, and nobody said so.
    """
    pickles = [name for name in source.files if name.endswith(".bin")]
    if pickles and not source.tensors and not allowed:
        raise IncompatibleError(
            f"the weights are a pickle ({pickles[0]}), which can hold code, expected safetensors",
            hint="Take a safetensors version, or add --allow-pickle: it is read with "
            "weights_only=True, which runs no code, and converted once",
        )


def check_target(recipe: Recipe, adapter: Adapter) -> None:
    """Check that the family converts to the target.

    Raises:
        UnsupportedError: It does not.
    """
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


def check_lengths(recipe: Recipe, context: int | None) -> None:
    """Check that the block divides the sequence and that both fit the context.

    Raises:
        IncompatibleError: They do not, or the block size is missing or out of place.
    """
    block, length = recipe.block_size, recipe.data.sequence_length
    if recipe.target == "mdlm" and block is not None:
        raise IncompatibleError(
            f"block_size {block} is for bd3lm, the target is mdlm",
            hint="Leave the block size out, or use --to bd3lm",
        )
    if recipe.target == "bd3lm" and block is None:
        raise IncompatibleError("bd3lm needs a block size", hint="Add --block 32, for instance")
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
    if block is not None and length % block:
        nearest = max(block, length // block * block)
        raise IncompatibleError(
            f"block size {block} does not divide data.sequence_length {length}: a training "
            "sequence must be a whole number of blocks",
            hint=f"--set data.sequence_length={nearest}, or another block size",
        )


def check_generation(recipe: Recipe, context: int | None, config: Mapping[str, Any]) -> None:
    """Check that the settings of decoding fit together, the objective and the context.

    Args:
        recipe: The resolved recipe.
        context: Longest text of the model in tokens, None if it names none.
        config: config.json.

    Raises:
        IncompatibleError: They do not.
    """
    chosen = recipe.generation
    long = too_many_new(chosen.max_new_tokens, context, config)
    if long and chosen.max_new_tokens != Generation().max_new_tokens:
        what, _, advice = long.partition(": ")
        raise IncompatibleError(f"generation.{what}", hint=advice.capitalize())
    for name in ("top_k", "top_p", "min_p"):
        if getattr(chosen, name) is not None and not chosen.temperature:
            raise IncompatibleError(
                f"generation.{name} does nothing without a generation.temperature above 0",
                hint="--set generation.temperature=0.7, for instance",
            )
    guided = chosen.guidance_scale not in (None, 1)
    together = {
        "block_length is for mdlm": chosen.block_length and recipe.target == "bd3lm",
        "approximate_cache needs block_length": chosen.approximate_cache
        and not chosen.block_length,
        "remasking and block_length do not go together": chosen.remasking and chosen.block_length,
        "remasking_ratio does nothing without remasking": chosen.remasking_ratio is not None
        and not chosen.remasking,
        "guidance_scale hides the prompt behind masks, which the uniform kernel has not": guided
        and recipe.noise.kernel == "uniform",
    }
    for what, wrong in together.items():
        if wrong:
            raise IncompatibleError(f"generation.{what}", hint="Leave one out")


def check_noise(recipe: Recipe) -> None:
    """Check that the fields about noise and loss fit together.

    Raises:
        IncompatibleError: They do not.
    """
    noise, training = recipe.noise, recipe.training
    if noise.min_time >= noise.max_time:
        raise IncompatibleError(
            f"noise.min_time {noise.min_time} is not below noise.max_time {noise.max_time}",
            hint="Times lie in (0, 1], the smaller one first",
        )
    if noise.kernel == "uniform":
        if noise.discrete_steps is None:
            raise IncompatibleError(
                "the uniform kernel has a bound in discrete time only",
                hint="--set noise.discrete_steps=1000, for instance",
            )
        wrong = {
            "noise.draw": noise.draw != "time",
            "noise.position_bias": noise.position_bias != 0,
            "noise.complementary": noise.complementary,
            "training.loss_weight": training.loss_weight != "elbo",
            "training.mask_noise_steps": training.mask_noise_steps > 0,
        }
        for name, found in wrong.items():
            if found:
                raise IncompatibleError(
                    f"{name} is about masked tokens, and the uniform kernel masks none",
                    hint=f"Leave {name} at its default, or noise.kernel at absorbing",
                )
    elif noise.discrete_steps is not None and (noise.complementary or noise.draw == "count"):
        other = "noise.complementary" if noise.complementary else "noise.draw=count"
        raise IncompatibleError(
            f"noise.discrete_steps and {other} exclude each other: the one draws times from a "
            "grid, the other has its own",
            hint="Leave noise.discrete_steps out",
        )
    if training.ar_loss_weight and recipe.target == "mdlm":
        raise IncompatibleError(
            "training.ar_loss_weight needs a clean stream, which mdlm does not have",
            hint="--to bd3lm, or leave training.ar_loss_weight out",
        )
