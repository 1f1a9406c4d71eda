"""Decoding options from a checkpoint's files and what a caller says."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from .ends import read_ids
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
_SETTINGS = {field.name for field in fields(DecodingOptions)} - _OWN
_SETTINGS |= {"do_sample", "eos_token_id", "max_length"}
_FACTS = ("mask_token_id", "block_size")
"""What a generation config repeats of the model's config."""
_ASIDE = {*_FACTS, "bos_token_id", "closing_token_ids", "return_dict_in_generate", "use_cache"}
"""Fields of a generation config that are read elsewhere, or decide nothing that is written."""
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty"), 1),
    **dict.fromkeys(("typical_p", "top_h"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("min_length", "min_new_tokens", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha"), 0),
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
"""Values at which settings of transformers do nothing; so do None, False and empty lists."""
DEFAULT_NEW_TOKENS = 128


def _standard_fields() -> frozenset[str]:
    return frozenset(vars(GenerationConfig()))  # type: ignore[no-untyped-call]


def _does_nothing(name: str, value: Any) -> bool:
    """Whether a setting of transformers' decoding is at the value at which it does nothing."""
    if name == "use_cache":
        return True
    known = name in _NOTHING or name in _standard_fields()
    if not known and name not in inspect.signature(GenerationMixin.generate).parameters:
        return False
    if isinstance(value, list | tuple | dict | str) or hasattr(value, "__len__"):
        return not len(value)
    return value is None or value is False or (name in _NOTHING and value == _NOTHING[name])


def _refuse(names: set[str]) -> None:
    if names:
        known = sorted(_SETTINGS)
        raise ValueError(f"unknown settings {sorted(names)}; known: {known}")


def set_fields(generation: Any) -> dict[str, Any]:
    """Return the fields of a generation config that are set, by name."""
    every = generation if isinstance(generation, Mapping) else vars(generation)
    return {
        name: value
        for name, value in every.items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }


def check_given(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse fields set in a generation config that decoding would ignore, or that contradict."""
    rest = set(given) - _SETTINGS - _ASIDE
    _refuse({name for name in rest if not _does_nothing(name, given[name])})
    for name in _FACTS:
        mine = getattr(config, name, None)
        if name in given and given[name] != mine:
            raise ValueError(f"{name} is {given[name]}, this model's is {mine}")


def _new_tokens(levels: list[Mapping[str, Any]], width: int) -> int:
    """How many tokens to write: the first level that says so, `max_new_tokens` first of each."""
    for level in levels:
        new: int | None = level.get("max_new_tokens")
        if new is not None:
            return new
        longest = level.get("max_length")
        if longest is not None:
            if longest <= width:
                raise ValueError(
                    f"max_length is {longest}, and the prompt takes {width} tokens of it: "
                    "give a larger one, or max_new_tokens"
                )
            return int(longest - width)
    return DEFAULT_NEW_TOKENS


def _temperature(levels: list[Mapping[str, Any]]) -> float:
    """What to draw with: the first level that says whether, or how, decides; 0 is not to draw."""
    drawn = False
    for level in levels:
        if level.get("do_sample") is False and not drawn:
            return 0.0
        drawn = drawn or bool(level.get("do_sample"))
        temperature: float | None = level.get("temperature")
        if temperature is not None:
            return temperature
    return 1.0 if drawn else 0.0


def decoding_options(
    config: Any,
    generation: Any,
    rows: int,
    seed: int | list[int] | None,
    overrides: dict[str, Any],
    *,
    given: Any | None = None,
    width: int = 0,
) -> DecodingOptions:
    """Put the options together, as transformers does.

    The call's come before those of the generation config it gives, before the checkpoint's, before
    the defaults; a field that is not set, or None in a generation config, is left to the next.

    Args:
        config: The model's config, which says what was trained.
        generation: The checkpoint's generation config, its fields named as in `DecodingOptions`.
        rows: Rows of the batch.
        seed: Row r draws from `seed + r`, or from its own in a list.
        overrides: The call's settings.
        given: A generation config that the call gives.
        width: Columns of the prompts, which `max_length` counts in.
    """
    unknown = set(overrides) - _SETTINGS
    _refuse({name for name in unknown if not _does_nothing(name, overrides[name])})
    own = set_fields(generation)
    said = {} if given is None else set_fields(given)
    check_given(config, said)
    if given is not None or unknown or set(own) - _SETTINGS - _ASIDE:
        rest = (set(own) - _SETTINGS - _ASIDE) & _standard_fields()
        idle = sorted(name for name in rest if not _does_nothing(name, own[name]))
        if idle:
            warnings.warn(
                f"the generation config has {idle}, which denoising has no use for", stacklevel=3
            )
    settings = {**dict.fromkeys(_SETTINGS), **own, **said, **overrides}
    settings["max_new_tokens"] = _new_tokens([overrides, said, own], width)
    settings["temperature"] = _temperature([overrides, said, own])
    ends = read_ids(settings["eos_token_id"])
    padding = read_ids(settings["pad_token_id"], "pad_token_id")
    settings["pad_token_id"] = next(iter((*padding, *ends)), 0)
    never = read_ids(settings["suppress_tokens"], "suppress_tokens")
    if any(token >= config.vocab_size for token in never):
        raise ValueError(
            f"suppress_tokens has {max(never)}, expected ids below {config.vocab_size}"
        )
    settings["suppress_tokens"] = never
    may_be_none = {"max_denoising_steps", "confidence_threshold"}
    facts = config.diffusion
    options = DecodingOptions(
        **{
            name: settings[name]
            for name in _SETTINGS - {"do_sample", "eos_token_id", "max_length"}
            if settings[name] is not None or name in may_be_none
        },
        mask_token_id=config.mask_token_id,
        block_size=getattr(config, "block_size", None),
        token_shift=bool(facts["token_shift"]),
        causal_context=facts.get("context") == "causal",
        noise_tokens=config.vocab_size if facts.get("noise_kernel") == "uniform" else 0,
        eos_token_ids=ends,
        seeds=_seeds(seed, rows),
    )
    if options.guided and facts.get("acts_on") == "noisy":
        raise ValueError(
            "guidance_scale hides the prompt behind masks, and what reads the prompt here is the "
            "base, which knows no mask"
        )
    return options


def _seeds(seed: int | list[int] | None, rows: int) -> tuple[int, ...]:
    if seed is None:
        return ()
    if isinstance(seed, Integral):
        return tuple(int(seed) + row for row in range(rows))
    if not isinstance(seed, list | tuple) or not all(isinstance(one, Integral) for one in seed):
        raise ValueError(f"seed is {seed!r}, expected a whole number, or a list with one per row")
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds for {rows} rows; give one number or one per row")
    return tuple(map(int, seed))
