"""config.json of a conversion that is to be run: whether it says one thing, and says it soundly.

Verification measures what such a file claims; decoding and evaluation believe it, so here it is
checked before anything is computed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.adapters import Adapter, adapter_of
from dllm_convert.common.nearest import no_folder
from dllm_convert.common.shown_text import shown
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.source.config_numbers import LARGEST, check_numbers, is_number, is_size, wrong
from dllm_convert.source.safetensors_header import load_json_object

_ATTENTION = {"mdlm": "bidirectional", "bd3lm": "block-causal"}
_SCHEDULES = ("linear", "cosine", "polynomial")
_KERNELS = ("absorbing", "uniform")
_CONTEXTS = ("block", "causal")
_HINT = "Put back the config.json that dllm-convert run wrote, or convert the model again"


def read_converted_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a converted checkpoint.

    Raises:
        DataError: If there is no such folder or file.
        IncompatibleError: If it is not a diffusion checkpoint.
    """
    if not folder.is_dir():
        raise no_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(
            f"{folder} has no config.json", hint="Give the folder that dllm-convert run wrote"
        )
    config = load_json_object(path)
    if diffusion_section(config) is None:
        raise IncompatibleError(
            f"{folder} is not a diffusion checkpoint: its config.json has no 'diffusion' section",
            hint=f"Convert it first: dllm-convert run {folder} --to bd3lm --block 32",
        )
    return config


def check_converted_config(config: Mapping[str, Any], folder: Path) -> Adapter:
    """Check what decoding and evaluation take from config.json, and return the family.

    Args:
        config: config.json, with its `diffusion` section.
        folder: Its folder.

    Raises:
        IncompatibleError: A field is not what it has to be, or two of them contradict each other.
        UnsupportedError: Its family is not known.
    """
    adapter = adapter_of(config)
    check_numbers(config, adapter, 0)
    section: Mapping[str, Any] = config["diffusion"]
    for key, value, fits, expected in _fields(config, section):
        if not fits:
            raise wrong(key, value, expected, _HINT)
    return adapter


def _fields(
    config: Mapping[str, Any], section: Mapping[str, Any]
) -> list[tuple[str, Any, bool, str]]:
    """Return each field's name, what it holds, whether that is sound, and what would be."""
    objective, mask = section.get("objective"), section.get("mask_token_id")
    size, rows = section.get("block_size"), config.get("vocab_size")
    blocks, given = objective == "bd3lm", config.get("max_position_embeddings")
    context = given if isinstance(given, int) and is_size(given) else LARGEST
    known = isinstance(objective, str) and objective in _ATTENTION
    shift, steps = section.get("token_shift"), section.get("discrete_steps")
    power = section.get("noise_power", 2.0)
    ids = f"an id below the {rows} rows of the embedding"
    fields: list[tuple[str, Any, bool, str]] = [
        ("vocab_size", rows, is_size(rows), "a whole number of at least 1"),
        ("diffusion.objective", objective, known, "mdlm or bd3lm"),
        ("diffusion.mask_token_id", mask, _is_id(mask) and _is_row(mask, rows), ids),
        ("mask_token_id", config.get("mask_token_id"), _same(config.get("mask_token_id"), mask),
         f"{shown(mask)} as in diffusion"),
        ("diffusion.block_size", size, _is_block(size, context) if blocks else size is None,
         f"a whole number from 1 to the context of {context}" if blocks
         else "null: MDLM has no blocks"),
        ("block_size", config.get("block_size"), _same(config.get("block_size"), size),
         f"{shown(size)} as in diffusion"),
        ("diffusion.token_shift", shift, isinstance(shift, bool), "true or false"),
        ("is_causal", config.get("is_causal"), config.get("is_causal") is False, "false"),
        ("diffusion.discrete_steps", steps, steps is None or is_size(steps), "a whole number"),
        ("diffusion.noise_power", power, is_number(power) and power > 0, "a number above 0"),
    ]  # fmt: skip
    for key, allowed in (
        ("attention", (_ATTENTION[str(objective)],) if known else ()),
        ("noise_schedule", _SCHEDULES),
        ("noise_kernel", _KERNELS),
        ("context", _CONTEXTS),
    ):
        value = section.get(key)
        absent = value is None and key in ("noise_kernel", "context") and key not in section
        fields.append((f"diffusion.{key}", value, absent or value in allowed, " or ".join(allowed)))
    return fields


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _is_block(value: object, context: int) -> bool:
    """Whether a block of so many tokens fits: decoding makes room for a whole one at once."""
    return isinstance(value, int) and is_size(value) and value <= context


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_row(value: Any, rows: Any) -> bool:
    return not is_size(rows) or value < rows


def diffusion_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a conversion wrote into config.json, None if the model is no conversion."""
    section = config.get("diffusion")
    return section if isinstance(section, Mapping) else None
