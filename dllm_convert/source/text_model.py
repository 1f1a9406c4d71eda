"""The text model inside a model of text and something else: its config, and its tensors' names.

Multimodal checkpoints hold the config of their text model under `text_config`, and its tensors
under `language_model`, as `model.language_model.layers.0...` or `language_model.model.layers.0...`.
What is converted is that text model alone; towers and projectors stay behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from dllm_convert.source.info import SourceInfo

INNER = "text_config"
_SEGMENT = "language_model."
_SHARED = (
    *("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "diffusion"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
)
"""Fields that a config of both may have outside only, and that are about the text model too."""


def text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of the text model inside another one, None if there is none inside."""
    inner = config.get(INNER)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("model_type"), str):
        return None
    shared = {key: config[key] for key in _SHARED if key in config}
    own = {key: value for key, value in inner.items() if value is not None or key not in shared}
    return {**shared, **own}


def read_text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text model inside a config, or that config itself."""
    return text_config(config) or dict(config)


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Return what the tensors of the text model are called by its own class.

    Args:
        names: Names in the files of a model that holds one.

    Returns:
        Name in the files to name in the class; what is not in it belongs to other parts. Where
        nothing is called `language_model`, all names as they are.
    """
    every = list(names)
    if not any(_SEGMENT in name for name in every):
        return {name: name for name in every}
    found = {}
    for name in every:
        before, segment, rest = name.partition(_SEGMENT)
        if segment and before in ("", "model."):
            found[name] = before + rest
        elif not segment and name.startswith("lm_head."):
            found[name] = name
    return found


def inner_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the same for a checkpoint whose config.json may hold a text model, or not."""
    every = list(names)
    return {name: name for name in every} if text_config(config) is None else text_names(every)


def text_model(source: SourceInfo) -> SourceInfo:
    """Return a source as its text model, if it holds one: its config, and what stays behind said.

    The tensors keep the names they have in the files.
    """
    inner = text_config(source.config)
    if inner is None:
        return source
    kept = text_names(source.tensors)
    parts = Counter(_part(name) for name in source.tensors if name not in kept)
    left = ", ".join(f"{part} ({count} tensors)" for part, count in sorted(parts.items()))
    said = (
        f"a {source.model_type} holds its text model inside, a {inner['model_type']}: that is what "
        "is converted" + (f"; left behind: {left}" if left else "")
    )
    return replace(
        source,
        config=inner,
        inside=source.model_type,
        warnings=(*source.warnings, said),
    )


def _part(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "model" else 1])
