"""How the attention of a base model is opened, decided from its config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dllm_convert.adapters.base import Adapter, Measured, SlidingWindow
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.planning.checks import layer_count
from dllm_convert.planning.layers import FULL, SLIDING, AttentionLayers, group_layers, kept_features
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.info import SourceInfo


@dataclass(frozen=True)
class AttentionPlan:
    """What changes in the attention.

    Attributes:
        changes: One sentence per change.
        config_updates: Config keys that make the changes; None is written as null.
        notes: One sentence per thing that is kept although it concerns positions.
        layers: The layers by type, before and after.
    """

    changes: tuple[str, ...]
    config_updates: Mapping[str, Any]
    notes: tuple[str, ...]
    layers: tuple[AttentionLayers, ...] = ()


def layer_types(config: Mapping[str, Any], adapter: Adapter) -> tuple[str, ...]:
    """Return the attention type of each layer, as transformers derives it from the config.

    Raises:
        IncompatibleError: `layer_types` does not fit the number of layers.
        UnsupportedError: A layer has a type other than full or sliding attention.
    """
    if adapter.measured is not None:
        return _measured_types(config, adapter, adapter.measured)
    layers, window = layer_count(config), adapter.window
    listed = config.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != layers:
            raise IncompatibleError(
                f"config.json: layer_types is {listed!r}, expected one entry for each of {layers}"
            )
        other = sorted({str(kind) for kind in listed} - {FULL, SLIDING})
        if other:
            raise UnsupportedError(
                f"layers of type {', '.join(other)} have no conversion, only {FULL} and {SLIDING}"
            )
        return tuple(listed)
    if adapter.local is not None:
        every = config.get(adapter.local.every, adapter.local.every_default)
        return tuple(SLIDING if layer % every else FULL for layer in range(layers))
    if window is None or not _in_force(config, window):
        return (FULL,) * layers
    first = 0
    if window.first_layer is not None:
        first = config.get(window.first_layer, window.first_layer_default)
    return tuple(SLIDING if layer >= first else FULL for layer in range(layers))


def _measured_types(
    config: Mapping[str, Any], adapter: Adapter, measured: Measured
) -> tuple[str, ...]:
    """Return the kinds that were measured; those with a window are full where it is opened."""
    values = adapter.window.overrides if adapter.window else {}
    window = FULL if all(config.get(key) == value for key, value in values.items()) else SLIDING
    return tuple(window if kind in measured.narrow else kind for kind in measured.kinds)


def _in_force(config: Mapping[str, Any], window: SlidingWindow) -> bool:
    """Whether the config has a window; a key that is absent stands for the family's default."""
    if window.flag is not None and not config.get(window.flag, False):
        return False
    return config.get("sliding_window", window.default) is not None


def _open_window(
    recipe: Recipe, config: Mapping[str, Any], adapter: Adapter, kinds: tuple[str, ...]
) -> tuple[str, Mapping[str, Any]]:
    count = Counter(kinds)[SLIDING]
    size = config.get("sliding_window", adapter.window.default if adapter.window else None)
    first = kinds.index(SLIDING)
    where = f"{count} of {len(kinds)} layers ({SLIDING}, from layer {first})"
    if recipe.sliding_window == "refuse":
        raise IncompatibleError(
            f"a sliding window of {size} tokens on {where}, and the recipe refuses to open it",
            hint="--set sliding_window=open",
        )
    if adapter.window is None:
        raise UnsupportedError(
            f"a sliding window on {where}, which this family is not known to have"
        )
    updates = dict(adapter.window.overrides)
    if "layer_types" in config:
        updates["layer_types"] = [FULL] * len(kinds)
    return f"sliding window of {size} tokens opened to full attention on {where}", updates


def _check_encoder(config: Mapping[str, Any], adapter: Adapter) -> None:
    for key in ("is_decoder", "add_cross_attention"):
        if config.get(key):
            raise IncompatibleError(
                f"config.json: {key} is true, so this {adapter.model_type} was trained as a "
                "decoder, expected a masked language model",
                hint="Take a checkpoint trained with masked language modelling",
            )
    position = config.get("position_embedding_type") or "absolute"
    if position != "absolute":
        raise UnsupportedError(
            f"position_embedding_type {position!r} has no conversion, expected 'absolute'"
        )


def _kept_encoder(config: Mapping[str, Any], adapter: Adapter) -> AttentionPlan:
    """What stays of an encoder's attention: all of it."""
    kinds = layer_types(config, adapter)
    stays, size, after = "attention is bidirectional already and stays so", None, "bidirectional"
    if adapter.local is not None and SLIDING in kinds:
        size = config.get(adapter.local.size, adapter.local.default)
        count = Counter(kinds)[SLIDING]
        stays += f"; {count} of {len(kinds)} layers see {size // 2} tokens to each side"
    layers = group_layers(kinds, before="bidirectional", after=after, window=size)
    if size is not None:
        layers = tuple(replace(group, after=group.before) for group in layers)
    return AttentionPlan((), {}, (stays,), layers)


def _present(config: Mapping[str, Any]) -> str:
    """Name the attention of a decoder: causal, unless it was converted before."""
    section = diffusion_section(config)
    return "causal" if section is None else str(section.get("attention", "opened"))


def _after(recipe: Recipe) -> str:
    if recipe.block_attention == "causal":
        return "causal"
    return "bidirectional" if recipe.target == "mdlm" else "block-causal"


def _opening(recipe: Recipe, config: Mapping[str, Any], layers: int) -> str:
    if recipe.block_attention == "causal":
        return (
            f"{_present(config)} attention stays strictly causal, on all {layers} layers, in "
            f"blocks of {recipe.block_size}, whose noisy tokens see what stands before them"
        )
    opened = (
        "bidirectional"
        if recipe.target == "mdlm"
        else f"block-causal in blocks of {recipe.block_size}: causal across blocks, "
        "bidirectional inside one"
    )
    return f"{_present(config)} attention becomes {opened}, on all {layers} layers"


def measured_attention(
    recipe: Recipe, source: SourceInfo, adapter: Adapter, measured: Measured
) -> AttentionPlan:
    """Decide what changes in a family that was measured: what the measurement found to open it.

    Raises:
        IncompatibleError: It has a window the recipe refuses.
    """
    config = source.config
    changes = []
    updates = dict(adapter.window.overrides) if adapter.window else {}
    size = config.get(next(iter(updates))) if updates else None
    if updates:
        count = sum(measured.layers.get(kind, 0) for kind in measured.narrow)
        where = f"{count} of {sum(measured.layers.values())} layers ({'; '.join(measured.narrow)})"
        if recipe.sliding_window == "refuse":
            raise IncompatibleError(
                f"a window of {size} tokens on {where}, and the recipe refuses to open it",
                hint="--set sliding_window=open",
            )
        changes.append(f"window of {size} tokens opened to the whole context on {where}")
    changes.append(_opening(recipe, config, sum(measured.layers.values())))
    note = (
        f"the family has no written adapter: it was measured on a small random instance with "
        f"transformers {measured.transformers}"
    )
    after = _after(recipe)
    before = _present(config)
    layers = group_layers(
        measured.kinds, before=before, after=after, window=size, windowed=measured.narrow
    )
    return AttentionPlan(tuple(changes), updates, (*kept_features(source), note), layers)


def open_attention(recipe: Recipe, source: SourceInfo, adapter: Adapter) -> AttentionPlan:
    """Decide what changes in the attention.

    Raises:
        IncompatibleError: The config contradicts itself, or has a window the recipe refuses.
        UnsupportedError: The model has layers that cannot be opened.
    """
    config = source.config
    if adapter.attention == "bidirectional":
        _check_encoder(config, adapter)
        return _kept_encoder(config, adapter)
    if adapter.measured is not None:
        return measured_attention(recipe, source, adapter, adapter.measured)
    kinds = layer_types(config, adapter)
    changes: list[str] = []
    updates: Mapping[str, Any] = {}
    if SLIDING in kinds:
        sentence, updates = _open_window(recipe, config, adapter, kinds)
        changes.append(sentence)
    elif adapter.window is not None and _in_force(config, adapter.window):
        # max_window_layers beyond the last layer: no layer has it, and none should get it later.
        updates = adapter.window.overrides
    changes.append(_opening(recipe, config, len(kinds)))
    after = _after(recipe)
    window = config.get("sliding_window", adapter.window.default if adapter.window else None)
    layers = group_layers(kinds, before=_present(config), after=after, window=window)
    return AttentionPlan(tuple(changes), updates, kept_features(source), layers)
