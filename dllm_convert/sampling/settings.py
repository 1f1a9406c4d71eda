"""Decoding options from a checkpoint's files and what a caller says.

This module travels inside the published modelling file, so it imports torch only.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .options import DecodingOptions

_OWN = {
    "mask_token_id",
    "block_size",
    "token_shift",
    "eos_token_ids",
    "seeds",
    "noise_tokens",
    "causal_context",
}


def decoding_options(
    config: Any,
    generation: Any,
    rows: int,
    seed: int | list[int] | None,
    overrides: dict[str, Any],
) -> DecodingOptions:
    """Put the options together: the call's before generation_config.json's before the defaults.

    Args:
        config: The model's config, which says what was trained.
        generation: A generation config; its fields carry the names of `DecodingOptions`.
        rows: Rows of the batch.
        seed: Row r draws from `seed + r`, or from its own in a list.
        overrides: The call's settings: fields of `DecodingOptions`, `eos_token_id`, `do_sample`.

    Raises:
        ValueError: If a setting is unknown or out of its range.
    """
    known = {field.name for field in fields(DecodingOptions)} - _OWN
    unknown = set(overrides) - known - {"eos_token_id", "do_sample"}
    if unknown:
        names = sorted(known | {"do_sample", "eos_token_id"})
        raise ValueError(f"unknown settings {sorted(unknown)}; known: {names}")
    settings: dict[str, Any] = {name: getattr(generation, name, None) for name in known}
    settings.update(overrides)
    sample = settings.pop("do_sample", None)
    if sample is False:
        settings["temperature"] = 0.0
    elif sample and not settings["temperature"]:
        settings["temperature"] = 1.0
    eos = settings.pop("eos_token_id", generation.eos_token_id)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
    if settings["pad_token_id"] is None:
        settings["pad_token_id"] = eos_ids[0] if eos_ids else 0
    if settings["max_new_tokens"] is None:
        settings["max_new_tokens"] = 128
    may_be_none = {"max_denoising_steps", "confidence_threshold"}
    facts = config.diffusion
    uniform = facts.get("noise_kernel") == "uniform"
    return DecodingOptions(
        **{
            key: value for key, value in settings.items() if value is not None or key in may_be_none
        },
        mask_token_id=config.mask_token_id,
        block_size=getattr(config, "block_size", None),
        token_shift=bool(facts["token_shift"]),
        causal_context=facts.get("context") == "causal",
        noise_tokens=config.vocab_size if uniform else 0,
        eos_token_ids=eos_ids,
        seeds=_seeds(seed, rows),
    )


def _seeds(seed: int | list[int] | None, rows: int) -> tuple[int, ...]:
    if seed is None:
        return ()
    if isinstance(seed, int):
        return tuple(seed + row for row in range(rows))
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds for {rows} rows; give one number or one per row")
    return tuple(seed)
