"""Decoding options from a checkpoint's files and what a caller says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig

from .asked import RULES, STOPS, read_rules, read_stops
from .ends import read_ids
from .noising import Noising
from .options import DecodingOptions

_OWN = {
    "mask_token_id",
    "block_size",
    "token_shift",
    "eos_token_ids",
    "seeds",
    "noise_tokens",
    "causal_context",
    "noising",
    "rules",
    "stops",
}
TAKEN = {field.name for field in fields(DecodingOptions)} - _OWN
TAKEN |= {"do_sample", "eos_token_id", "max_length"} | RULES | STOPS
"""Settings that decide what is written, by the names that `generate` has for them."""
_FACTS = ("mask_token_id", "block_size")
"""What a generation config repeats of the model's config."""
HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(_FACTS, "a fact of the model, which it has to agree with"),
    "bos_token_id": "nothing is put before a prompt",
    "closing_token_ids": "read with the prompt",
    "return_dict_in_generate": "read where the output is put together",
    "use_cache": "the text is the same with and without",
    "max_cache_len": "the cache is as long as the text",
    "renormalize_logits": "probabilities always sum to one",
    "compile_config": "it decides how fast, and nothing is compiled",
    "disable_compile": "nothing is compiled",
    "tokenizer": "read where there are stop strings",
    "transformers_version": "says who wrote the file",
}
"""Settings that decide nothing that is written, or are read elsewhere, and why."""
_BEAMS = (
    "a diffusion writes many tokens at once and has no beams of next tokens to keep; "
    "num_return_sequences with a temperature writes several texts"
)
_SEARCH = "it searches among next tokens, and a diffusion writes them in no order"
_DRAFTS = "drafts are denoised here by the model itself: verify_with"
_ENCODER = "it is for models that have an encoder and a decoder"
_KEPT = "a text is not written token by token: an observer is shown every step"
_CACHE = "decoding has a cache of its own, on the model's device"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("num_beams", "num_beam_groups", "early_stopping", "length_penalty"),
            *("diversity_penalty", "constraints", "force_words_ids"),
        ),
        _BEAMS,
    ),
    **dict.fromkeys(("penalty_alpha", "low_memory", "dola_layers"), _SEARCH),
    **dict.fromkeys(
        (
            *("assistant_model", "assistant_tokenizer", "is_assistant", "num_assistant_tokens"),
            *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
            *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
            *("assistant_ensemble_weight", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
            *("speculation_type", "use_mtp"),
        ),
        _DRAFTS,
    ),
    **dict.fromkeys(
        (
            *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
            *("decoder_start_token_id",),
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _KEPT
    ),
    **dict.fromkeys(("cache_implementation", "cache_config", "prefill_chunk_size"), _CACHE),
    "continuous_batching_config": "it pages a cache that denoising does not have",
    "custom_generate": "it would be another decoding",
    "negative_prompt_ids": "guidance_scale hides the prompt behind masks instead",
    "negative_prompt_attention_mask": "guidance_scale hides the prompt behind masks instead",
    "synced_gpus": "each process decodes by itself",
    "token_healing": "prompts are not changed: leave their last token away",
}
"""Settings of transformers that denoising cannot honour, and why."""
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), 1),
    **dict.fromkeys(("encoder_repetition_penalty", "length_penalty"), 1),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "diversity_penalty", "penalty_alpha"), 0),
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
"""Values at which refused settings do nothing; so do None, False and empty lists."""
_CACHES = ("dynamic", "static")
"""Caches of transformers that differ from ours in speed alone."""
DEFAULT_NEW_TOKENS = 128


def _does_nothing(name: str, value: Any) -> bool:
    """Whether a setting of transformers' decoding is at the value at which it does nothing."""
    if name == "cache_implementation" and value in _CACHES:
        return True
    if isinstance(value, list | tuple | dict | str) or hasattr(value, "__len__"):
        return not len(value) or (name in _NOTHING and bool(value == _NOTHING[name]))
    return value is None or value is False or (name in _NOTHING and value == _NOTHING[name])


def _refuse(given: Mapping[str, Any]) -> None:
    """Refuse settings that are not honoured, unless they do nothing."""
    for name in sorted(set(given) & set(REFUSED)):
        if not _does_nothing(name, given[name]):
            raise ValueError(f"{name} is {given[name]!r}, which is refused: {REFUSED[name]}")
    unknown = set(given) - TAKEN - set(HARMLESS) - set(REFUSED)
    # What a later transformers knows and this file does not, at the value it has by itself.
    standard = vars(GenerationConfig())  # type: ignore[no-untyped-call]
    unknown = {n for n in unknown if n not in standard or not _does_nothing(n, given[n])}
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; known: {sorted(TAKEN)}")


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
    _refuse(given)
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
    device: torch.device | str = "cpu",
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
        width: Columns of the prompts, which `max_length` and `min_length` count in.
        device: Where the logits will be.
    """
    _refuse(overrides)
    own = set_fields(generation)
    said = {} if given is None else set_fields(given)
    check_given(config, said)
    idle = sorted(name for name in set(own) & set(REFUSED) if not _does_nothing(name, own[name]))
    if idle:
        warnings.warn(
            f"the generation config has {idle}, which denoising has no use for", stacklevel=3
        )
    asked = {"tokenizer": None, **dict.fromkeys(TAKEN)}
    settings = {**asked, **own, **said, **overrides}
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
    kernel = facts.get("noise_kernel", "absorbing")
    copies = settings["num_return_sequences"]
    many = rows * copies if isinstance(copies, int) and copies > 1 else rows
    options = DecodingOptions(
        **{
            name: settings[name]
            for name in {field.name for field in fields(DecodingOptions)} - _OWN
            if settings[name] is not None or name in may_be_none
        },
        mask_token_id=config.mask_token_id,
        block_size=getattr(config, "block_size", None),
        token_shift=bool(facts["token_shift"]),
        causal_context=facts.get("context") == "causal",
        noising=Noising.of(facts),
        noise_tokens=0 if kernel == "absorbing" else config.vocab_size,
        eos_token_ids=ends,
        seeds=_seeds(seed, many),
        rules=read_rules(settings, config.vocab_size, ends, width, device),
        stops=read_stops(settings),
    )
    if options.sampler and kernel == "neighbours":
        raise ValueError(
            "sampler draws from a reverse process, and that of neighbours multiplies with a matrix "
            "of all words which is only there in training: leave it out"
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
