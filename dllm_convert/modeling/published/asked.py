"""Rules and stops of a text from the settings that transformers has for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    MaxTimeCriteria,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from .ends import read_ids
from .rules import Processor, TextRules
from .stopping import Criterion, Stops, StopText

RULES = frozenset(
    {
        *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
        *("min_length", "min_new_tokens", "begin_suppress_tokens", "remove_invalid_values"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
        *("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config"),
        *("logits_processor", "prefix_allowed_tokens_fn"),
    }
)
"""Settings that change what a token may be."""
STOPS = frozenset({"max_time", "stop_strings", "stopping_criteria"})
"""Settings that end a text."""


def _number(settings: Mapping[str, Any], name: str, idle: float, most: float) -> float | None:
    """A number above 0, up to `most`, of a setting; None where it is not given or is `idle`."""
    value = settings[name]
    if value is None or value == idle:
        return None
    is_number = isinstance(value, int | float | Real) and not isinstance(value, bool)
    if not (is_number and 0 < float(value) <= most):
        limit = "" if most == math.inf else f", at most {most:g}"
        raise ValueError(f"{name} is {value!r}, expected a number above 0{limit}")
    return float(value)


def _count(settings: Mapping[str, Any], name: str) -> int:
    value = settings[name]
    if value is None:
        return 0
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}, expected a whole number from 0 on")
    return int(value)


def _called(settings: Mapping[str, Any], name: str) -> tuple[Callable[..., Any], ...]:
    """The processors or criteria of a call: one, or several."""
    given = settings[name]
    found = tuple(given if isinstance(given, Iterable) else [] if given is None else [given])
    for one in found:
        if not callable(one):
            raise ValueError(
                f"{name} has {one!r}, expected objects of transformers that are called"
            )
    return found


def _shaped(settings: Mapping[str, Any], name: str, make: Callable[[Any], Any]) -> Any:
    """Make something of a setting's value; what is no such value is refused by its name."""
    value = settings[name]
    try:
        return make(value)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{name} is {value!r}, which is none that is taken: {error}") from error


def _biases(settings: Mapping[str, Any], ends: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """What is added to the logits of a token, or of one that ends a sequence of tokens."""
    found: dict[tuple[int, ...], float] = {}

    def of_sequences(bias: Any) -> Any:
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        given = {tuple(ids): float(value) for ids, value in pairs}
        return SequenceBiasLogitsProcessor(given).sequence_bias  # type: ignore[arg-type]

    def of_words(banned: Any) -> Any:
        return NoBadWordsLogitsProcessor(banned, list(ends)).sequence_bias

    if settings["sequence_bias"]:
        found |= _shaped(settings, "sequence_bias", of_sequences)
    if settings["bad_words_ids"]:
        found |= _shaped(settings, "bad_words_ids", of_words)
    return found


def _watermark(mark: Any, vocabulary: int, device: torch.device | str) -> Callable[..., Any]:
    if isinstance(mark, SynthIDTextWatermarkingConfig):
        raise ValueError(
            "SynthID's, whose processor keeps a state from token to token; WatermarkingConfig's "
            "does not"
        )
    mark = WatermarkingConfig(**mark) if isinstance(mark, Mapping) else mark
    return mark.construct_processor(vocabulary, str(device))  # type: ignore[no-any-return]


def read_rules(
    settings: Mapping[str, Any],
    vocabulary: int,
    ends: tuple[int, ...],
    width: int,
    device: torch.device | str,
) -> TextRules:
    """Return what settings say of the tokens of a text.

    Args:
        settings: Those of `RULES`, None where one is not given.
        vocabulary: Ids there are.
        ends: Tokens that end a text.
        width: Columns of the prompts, which `min_length` counts in.
        device: Where the logits will be.

    Raises:
        ValueError: A value is none that transformers takes.
    """
    biases = _biases(settings, ends)
    long = {ids: value for ids, value in biases.items() if len(ids) > 1}
    never = read_ids(settings["begin_suppress_tokens"], "begin_suppress_tokens")
    last = read_ids(settings["forced_eos_token_id"], "forced_eos_token_id")
    high = max((*never, *last, *(token for ids in biases for token in ids)), default=0)
    if high >= vocabulary:
        raise ValueError(f"there is no token with the id {high}: expected ids below {vocabulary}")
    processors: list[Processor] = []
    if long:
        processors.append(SequenceBiasLogitsProcessor(long))  # type: ignore[arg-type]
    if ngram := _count(settings, "no_repeat_ngram_size"):
        processors.append(NoRepeatNGramLogitsProcessor(ngram))
    if settings["forced_bos_token_id"] is not None:
        first = _shaped(settings, "forced_bos_token_id", int)
        processors.append(ForcedBOSTokenLogitsProcessor(first))
    custom = _called(settings, "logits_processor")
    if settings["watermarking_config"] is not None:
        mark = partial(_watermark, vocabulary=vocabulary, device=device)
        custom = (*custom, _shaped(settings, "watermarking_config", mark))
    decay = None
    if settings["exponential_decay_length_penalty"] is not None:
        decay = _shaped(
            settings,
            "exponential_decay_length_penalty",
            lambda pair: (int(pair[0]), float(pair[1])),
        )
    return TextRules(
        repetition_penalty=_number(settings, "repetition_penalty", 1, math.inf) or 1.0,
        token_bias=tuple((ids[0], value) for ids, value in biases.items() if len(ids) == 1),
        min_new_tokens=max(
            _count(settings, "min_new_tokens"), _count(settings, "min_length") - width, 0
        ),
        begin_suppress_tokens=never,
        forced_last=last,
        decay=decay,
        is_finite=bool(settings["remove_invalid_values"]),
        top_h=_number(settings, "top_h", 1, 1),
        typical_p=_number(settings, "typical_p", 1, 1),
        epsilon_cutoff=_number(settings, "epsilon_cutoff", 0, 1),
        eta_cutoff=_number(settings, "eta_cutoff", 0, 1),
        processors=tuple(processors),
        allowed=settings["prefix_allowed_tokens_fn"],
        custom=custom,
    )


def read_stops(settings: Mapping[str, Any]) -> Stops:
    """Return what settings say of where a text ends, those of `STOPS`, and the `tokenizer`.

    Raises:
        ValueError: There are stop strings and no tokenizer, or a value is none that is taken.
    """
    most = _number(settings, "max_time", math.inf, math.inf)
    criteria: list[Criterion] = []
    strings = settings["stop_strings"]
    if strings:
        named = [strings] if isinstance(strings, str) else _shaped(settings, "stop_strings", list)
        if not all(isinstance(one, str) and one for one in named):
            raise ValueError(f"stop_strings is {strings!r}, expected texts")
        if settings["tokenizer"] is None:
            raise ValueError(
                f"stop_strings is {strings!r}, and the text of tokens is not known: give generate "
                "the tokenizer too, tokenizer=tokenizer"
            )
        criteria.append(StopText(settings["tokenizer"], tuple(named)))
    for one in _called(settings, "stopping_criteria"):
        if isinstance(one, MaxTimeCriteria):
            # Looked at after every forward, not only where a token became final.
            most = min(one.max_time, math.inf if most is None else most)
        else:
            criteria.append(one)
    return Stops(tuple(criteria), most)
