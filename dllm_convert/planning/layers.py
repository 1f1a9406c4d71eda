"""The attention of a model layer by layer, and what else shapes it, as config and headers say."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dllm_convert.source.info import SourceInfo

FULL, SLIDING = "full_attention", "sliding_attention"

_SOFT_CAPS = {
    "attn_logit_softcapping": "attention scores",
    "final_logit_softcapping": "logits",
    "attention_logit_cap": "attention scores",
    "logits_soft_cap": "logits",
}


@dataclass(frozen=True)
class AttentionLayers:
    """Layers whose attention has the same type.

    Attributes:
        type: `full_attention` or `sliding_attention`, as transformers names it.
        layers: Their numbers, from 0.
        window: Tokens of the sliding window, None without one.
        before: Attention of the source.
        after: Attention of the conversion, over the whole text.
    """

    type: str
    layers: tuple[int, ...]
    window: int | None
    before: str
    after: str


def group_layers(
    kinds: tuple[str, ...],
    *,
    before: str,
    after: str,
    window: int | None = None,
    windowed: Collection[str] = (SLIDING,),
) -> tuple[AttentionLayers, ...]:
    """Group layers by type, in the order in which the types first occur.

    Args:
        kinds: Type of each layer.
        before: How a layer attends in the source, but for its window.
        after: How it attends in the conversion.
        window: Tokens of the sliding layers' window.
        windowed: Types of layers that have it.
    """
    groups = []
    for kind in dict.fromkeys(kinds):
        numbers = tuple(number for number, other in enumerate(kinds) if other == kind)
        size = window if kind in windowed else None
        was = before if size is None else f"{before}, window of {size}"
        groups.append(AttentionLayers(kind, numbers, size, was, after))
    return tuple(groups)


def _scalings(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where a rotary scaling applies, and its parameters.

    transformers 5 may give one per layer type, where older files have one for all layers.
    """
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if not isinstance(value, Mapping):
            continue
        nested = {k: v for k, v in value.items() if isinstance(v, Mapping)}
        if nested:
            yield from ((f" of {kind} layers", scaling) for kind, scaling in nested.items())
        else:
            yield "", value
        return


def kept_features(source: SourceInfo) -> tuple[str, ...]:
    """Name what shapes attention and stays: rotary scaling, soft-caps, sinks; a sentence each."""
    found = []
    for where, scaling in _scalings(source.config):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            own = ""
            if "dynamic" in str(kind) or kind == "longrope":
                own = "; it depends on a text's length: of each row, in decoding of its final text"
            factor = scaling.get("factor")
            found.append(f"rotary scaling{where} kept: {kind}, factor {factor}{own}")
    for key, what in _SOFT_CAPS.items():
        cap = source.config.get(key)
        if cap:
            found.append(f"soft-cap of {cap} on {what} kept ({key})")
    sinks = [name for name in source.tensors if name.endswith(".sinks")]
    if sinks:
        found.append(f"attention sinks kept, on {len(sinks)} layers: a learnt weight per head")
    return tuple(found)
