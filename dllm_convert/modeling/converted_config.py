"""config.json of a conversion that is to be run: whether it says one thing, and says it soundly.

Verification measures what such a file claims; decoding and evaluation believe it, so here it is
checked before anything is computed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.adapters import Adapter, adapter_of
from dllm_convert.common.diffusion_section import ATTENTION, DiffusionSection, diffusion_section
from dllm_convert.common.nearest import no_folder
from dllm_convert.common.shown_text import shown
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.source.config_numbers import (
    LARGEST,
    check_numbers,
    is_id,
    is_number,
    is_size,
    wrong,
)
from dllm_convert.source.safetensors_header import load_json_object

_SCHEDULES = ("linear", "cosine", "polynomial", "learned")
_KERNELS = ("absorbing", "uniform", "neighbours")
_CONTEXTS = ("block", "causal")
_DRAFTS, _BEHIND = ("open", "causal"), ("mask", "cache")
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
    if not isinstance(config.get("model_type"), str):
        raise IncompatibleError(
            f"config.json of {folder} has no model_type",
            hint=_HINT,
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
    section, rows = read_section(config), config.get("vocab_size")
    mask, size, gated = section.mask_token_id, section.block_size, section.is_gated
    given = config.get("max_position_embeddings")
    context = given if isinstance(given, int) and is_size(given) else LARGEST
    _check(
        ("vocab_size", rows, is_size(rows), "a whole number of at least 1"),
        # The mask of a gated model is a vector of its own and needs no row.
        ("diffusion.mask_token_id", mask, is_size(rows) and (gated or mask < int(rows or 0)),
         f"an id below the {rows} rows of the embedding"),
        ("mask_token_id", config.get("mask_token_id"), _same(config.get("mask_token_id"), mask),
         f"{shown(mask)} as in diffusion"),
        # Decoding makes room for a whole block at once.
        ("diffusion.block_size", size, size is None or size <= context,
         f"a whole number from 1 to the context of {context}"),
        ("block_size", config.get("block_size"), _same(config.get("block_size"), size),
         f"{shown(size)} as in diffusion"),
        ("diffusion.noise_classes", section.noise_classes,
         all(word < int(rows or 0) for words in section.noise_classes for word in words),
         f"ids below the {rows} rows of the embedding"),
        # Without our class a gated model is its base.
        ("is_causal", config.get("is_causal"), (config.get("is_causal") is False) is not gated,
         "true, or nothing" if gated else "false"),
    )  # fmt: skip
    return adapter


def read_section(config: Mapping[str, Any]) -> DiffusionSection:
    """Read the `diffusion` section of a config.json, checked for itself.

    Args:
        config: config.json; that it has a section is known.

    Raises:
        IncompatibleError: A field is missing, is not what it has to be, or contradicts another.
    """
    section: Mapping[str, Any] = config["diffusion"]
    objective, mask = section.get("objective"), section.get("mask_token_id")
    size, power = section.get("block_size"), section.get("noise_power", 2.0)
    shift, steps = section.get("token_shift"), section.get("discrete_steps")
    known = isinstance(objective, str) and objective in ATTENTION
    blocks = objective == "bd3lm"
    _check(
        ("diffusion.objective", objective, known, " or ".join(ATTENTION)),
        ("diffusion.mask_token_id", mask, is_id(mask), "an id of the vocabulary"),
        ("diffusion.block_size", size, is_size(size) if blocks else size is None,
         "a whole number of at least 1" if blocks else "null: MDLM has no blocks"),
        ("diffusion.token_shift", shift, isinstance(shift, bool), "true or false"),
        ("diffusion.discrete_steps", steps, steps is None or is_size(steps), "a whole number"),
        ("diffusion.noise_power", power, is_number(power) and power > 0, "a number above 0"),
    )  # fmt: skip
    _check_walk(section)
    _check_classes(section)
    if section.get("acts_on", "all") != "all":
        _check_gated(section)
    if "behind" in section and section.get("acts_on") != "noisy":
        nothing = "nothing: no adapter acts on noisy tokens"
        raise wrong("diffusion.behind", section["behind"], nothing, _HINT)
    if section.get("draft") == "causal" and section.get("context") != "causal":
        expected = "causal, where noisy tokens see nothing ahead"
        raise wrong("diffusion.context", section.get("context"), expected, _HINT)
    if section.get("behind") == "cache" and section.get("draft") != "causal":
        raise wrong("diffusion.draft", section.get("draft"), "causal, behind a cache", _HINT)
    for key, allowed, may_lack in (
        ("attention", (ATTENTION[str(objective)],), False),
        # A checkpoint of somebody else need not say its noise: MDLM's own is linear, of masks.
        ("noise_schedule", _SCHEDULES, True),
        ("noise_kernel", _KERNELS, True),
        ("context", _CONTEXTS, True),
        ("draft", _DRAFTS, True),
        ("behind", _BEHIND, True),
    ):
        value, absent = section.get(key), key not in section
        sound = may_lack if absent else value in allowed
        _check((f"diffusion.{key}", value, sound, " or ".join(allowed)))
    return DiffusionSection.of(section)


def _check_classes(section: Mapping[str, Any]) -> None:
    exponents, words = section.get("noise_exponents"), section.get("noise_classes")
    if section.get("noise_schedule") != "learned":
        for key, value in (("noise_exponents", exponents), ("noise_classes", words)):
            if value is not None:
                raise wrong(f"diffusion.{key}", value, "nothing: no schedule is learned", _HINT)
        return
    numbers = isinstance(exponents, list) and bool(exponents)
    numbers = numbers and all(is_number(one) and 0 < one < 1e6 for one in exponents or ())
    lists = isinstance(words, list) and all(isinstance(ids, list) for ids in words)
    every = [one for ids in words or () for one in ids] if lists else []
    sound = lists and all(map(is_id, every)) and len(set(map(str, every))) == len(every)
    _check(
        ("diffusion.noise_exponents", exponents, numbers, "a number above 0 for each class"),
        ("diffusion.noise_classes", words, sound and len(words or ()) + 1 == len(exponents or ()),
         "ids of all classes but the last, each once"),
    )  # fmt: skip


def _check_walk(section: Mapping[str, Any]) -> None:
    jumps = section.get("noise_jumps")
    if section.get("noise_kernel") == "neighbours":
        sound = jumps is not None and is_number(jumps) and 0 < jumps <= 64
        _check(
            ("diffusion.noise_jumps", jumps, sound, "a number above 0, at most 64"),
            ("diffusion.discrete_steps", section.get("discrete_steps"),
             is_size(section.get("discrete_steps")), "a whole number"),
        )  # fmt: skip
    elif jumps is not None:
        raise wrong("diffusion.noise_jumps", jumps, "nothing: no word walks", _HINT)


def _check_gated(section: Mapping[str, Any]) -> None:
    rank, alpha = section.get("adapter_rank"), section.get("adapter_alpha")
    targets, context = section.get("adapter_targets"), section.get("context")
    named, norms = _are_names(targets), section.get("adapter_norms", [])
    _check(
        ("diffusion.acts_on", section["acts_on"], section["acts_on"] == "noisy", "all or noisy"),
        ("diffusion.objective", section.get("objective"), section.get("objective") == "bd3lm",
         "bd3lm: mdlm has no clean tokens for the base"),
        ("diffusion.context", context, context == "causal", "causal, as the base reads"),
        ("diffusion.token_shift", section.get("token_shift"), section.get("token_shift") is True,
         "true, as the base predicts"),
        ("diffusion.adapter_rank", rank, is_size(rank), "a whole number of at least 1"),
        ("diffusion.adapter_alpha", alpha, is_size(alpha), "a whole number of at least 1"),
        ("diffusion.adapter_targets", targets, named and bool(targets), "names of linear layers"),
        ("diffusion.adapter_norms", norms, _are_names(norms), "names of norms"),
    )  # fmt: skip


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check(*fields: tuple[str, Any, bool, str]) -> None:
    """Refuse the first field that is not sound.

    Args:
        *fields: Its name, what it holds, whether that is sound, and what would be.
    """
    for key, value, sound, expected in fields:
        if not sound:
            raise wrong(key, value, expected, _HINT)


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other
