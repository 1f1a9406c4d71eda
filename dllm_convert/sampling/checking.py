"""Settings of decoding against a checkpoint's own files, before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.errors import spelt
from dllm_convert.modeling.converted_config import check_converted_config, read_section
from dllm_convert.modeling.published.ends import read_ids
from dllm_convert.modeling.published.options import DecodingOptions
from dllm_convert.modeling.published.settings import decoding_options
from dllm_convert.recipe.rules import decoding_contradictions
from dllm_convert.source.context import context_length, too_many_new
from dllm_convert.source.safetensors_header import load_json_object

_CLOSING = "closing_token_ids"


def check_decoding(folder: Path, given: Mapping[str, Any]) -> DecodingOptions | None:
    """Refuse settings that contradict each other, the checkpoint or what it has saved.

    Args:
        folder: A converted checkpoint; only config.json and generation_config.json are read.
        given: Fields of `DecodingOptions`.

    Returns:
        All settings together; None where the folder holds no diffusion checkpoint, of which
        loading it says more.

    Raises:
        IncompatibleError: config.json contradicts itself, or is of no known family.
        ValueError: They contradict, or do nothing.
    """
    config = _read(folder / "config.json")
    if diffusion_section(config) is None:
        return None
    adapter = check_converted_config(config, folder)
    saved = _read(folder / "generation_config.json")
    read_ids(saved.get(_CLOSING), _CLOSING)
    options = decoding_options(SimpleNamespace(**config), saved, 1, None, dict(given))
    if isinstance(given.get("max_new_tokens"), int):
        context = context_length(config, adapter)
        long = too_many_new(options.max_new_tokens, context, config)
        if long:
            raise ValueError(long)
    section = read_section(config)
    for wrong, _, _ in decoding_contradictions(
        given,
        options,
        blocks=section.objective == "bd3lm",
        masks=section.noise_kernel == "absorbing",
    ):
        raise ValueError(spelt(wrong, str))
    return options


def _read(path: Path) -> dict[str, Any]:
    return load_json_object(path) if path.is_file() else {}
