"""Checks of a checkpoint and a recipe that need headers and config only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.schema import Recipe
from dllm_convert.source_info import SourceInfo, TensorInfo

LAYER = re.compile(r"[\w.]*?\blayers?\.(\d+)\.(.+)")
_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


def context_length(config: Mapping[str, Any], adapter: Adapter) -> int | None:
    """Return the longest text in tokens, None if the config does not say."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or isinstance(positions, bool):
        return None
    if adapter.positions_after_pad:
        pad = config.get("pad_token_id")
        positions -= (pad if isinstance(pad, int) else 1) + 1
    return positions


def is_tied(config: Mapping[str, Any], adapter: Adapter) -> bool:
    """Whether head and embedding share weights; absent means the default of transformers' config.

    That default is true for the encoders and false for the decoders here.
    """
    default = adapter.attention == "bidirectional"
    if adapter.measured is not None:
        default = adapter.measured.config.get("tie_word_embeddings", default)
    return bool(config.get("tie_word_embeddings", default))


def check_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], adapter: Adapter, *, rows: int
) -> tuple[str, ...]:
    """Check that the weights are a complete language model; return names of vocabulary tensors.

    Args:
        config: config.json.
        tensors: Tensor name to description, of all files.
        adapter: The family.
        rows: Expected rows of embedding and head.

    Raises:
        IncompatibleError: The head or the embedding is missing, or a shape does not fit.
    """
    stock = f"a checkpoint of {adapter.stock_class}"
    if adapter.embedding not in tensors:
        raise IncompatibleError(f"the weights have no {adapter.embedding}, expected {stock}")
    missing = [name for name in adapter.head_required if name not in tensors]
    if adapter.head not in tensors and not is_tied(config, adapter):
        missing.append(adapter.head)
    if missing:
        raise IncompatibleError(
            f"the weights have no {', '.join(missing)}: their language-model head would be random",
            hint=f"Take {stock}, not of a headless encoder",
        )
    present = [n for n in (adapter.embedding, adapter.head, *adapter.head_biases) if n in tensors]
    for name in present:
        if not tensors[name].shape or tensors[name].shape[0] != rows:
            raise IncompatibleError(
                f"{name} has shape {tensors[name].shape}, expected {rows} rows as the embedding"
            )
    if adapter.measured is None:
        _check_layers(config, tensors)
    return tuple(present)


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


def _check_layers(config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Check that every layer has the same tensors: transformers would fill a gap at random."""
    layers: dict[int, set[str]] = {}
    for name in tensors:
        found = LAYER.fullmatch(name)
        if found:
            layers.setdefault(int(found[1]), set()).add(found[2])
    expected = range(layer_count(config))
    if set(layers) != set(expected):
        raise IncompatibleError(
            f"the weights have {len(layers)} layers, config.json says {len(expected)}",
            hint="Correct num_hidden_layers, or take the complete weights",
        )
    complete = set().union(*layers.values())
    for layer, found_names in sorted(layers.items()):
        if found_names != complete:
            missing = ", ".join(sorted(complete - found_names)[:3])
            raise IncompatibleError(
                f"layer {layer} has no {missing}, which other layers have: it would be random",
                hint="Take the complete weights",
            )


def unused_tensors(names: Iterable[str], adapter: Adapter) -> tuple[str, ...]:
    """Return the tensors that the stock class does not load, such as a pooler."""
    if adapter.unused_tensors is None:
        return ()
    return tuple(name for name in names if re.fullmatch(adapter.unused_tensors, name))


def check_quantised(source: SourceInfo, vocabulary_tensors: tuple[str, ...]) -> None:
    """Check that the vocabulary tensors hold floating-point numbers.

    Raises:
        IncompatibleError: The weights are quantised.
    """
    if "quantization_config" in source.config:
        raise IncompatibleError(
            "config.json has a quantization_config: quantised weights cannot be trained on",
            hint="Take the checkpoint in bfloat16, float16 or float32 that it was made from",
        )
    if source.kind == "gguf":
        return
    for name in vocabulary_tensors:
        if source.tensors[name].dtype not in _FLOAT_DTYPES:
            raise IncompatibleError(
                f"{name} has dtype {source.tensors[name].dtype}, "
                f"expected one of {', '.join(sorted(_FLOAT_DTYPES))}"
            )


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


def check_generation(recipe: Recipe) -> None:
    """Check that the settings of decoding fit together and the objective.

    Raises:
        IncompatibleError: They do not.
    """
    chosen = recipe.generation
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
