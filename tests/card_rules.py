"""Rules that our own cards keep: keys and values of the metadata, and the Markdown below.

The Hub validates metadata itself when something is pushed; here it is done without a network, more
strictly: every key is one that the Hub reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from card_markdown import markdown_problems

from dllm_convert.card.checks import metadata_problems, split
from dllm_convert.common.hub_names import LANGUAGE, LICENCE_FILE_NAMES, LICENCES, is_model_id

RELATIONS = ("adapter", "finetune", "merge", "quantized")

PIPELINE_TAGS = frozenset(
    (
        *("text-generation", "fill-mask", "text-classification", "token-classification"),
        *("feature-extraction", "question-answering", "summarization", "translation"),
        *("sentence-similarity", "text-ranking", "text-to-speech", "image-text-to-text"),
        *("zero-shot-classification", "table-question-answering", "any-to-any", "other"),
    )
)
"""Tasks of the Hub that a language model may be filed under."""


def card_problems(text: str, folder: Path) -> list[str]:
    """Return everything that is wrong with a card.

    Args:
        text: README.md.
        folder: The checkpoint, for what the card links to.
    """
    front, body = split(text)
    content, problems = metadata_problems(front, folder)
    found = {*problems, *_value_problems(content or {})}
    return [*found, *markdown_problems(body, folder)]


def _value_problems(content: dict[Any, Any]) -> Iterator[str]:
    for key, value in content.items():
        expected, fits = KEYS.get(key, ("a key the Hub reads", _never))
        if not fits(value):
            yield f"metadata {key}: {value!r} is not {expected}"


def _never(_: Any) -> bool:
    return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _one_of(words: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Accept one value or a list of them, as the Hub does."""

    def check(value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return bool(values) and all(fits(entry) for entry in values)

    return check


def _is_model_index(value: Any) -> bool:
    from huggingface_hub.repocard_data import model_index_to_eval_results

    if not isinstance(value, list) or not value:
        return False
    try:
        name, results = model_index_to_eval_results(value)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        return False
    texts = [
        text
        for result in results
        for text in (result.task_type, result.dataset_type, result.dataset_name, result.metric_type)
    ]
    numbers = [result.metric_value for result in results]
    return bool(numbers) and all(map(_is_text, [name, *texts])) and all(map(_is_number, numbers))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_given(value: Any) -> bool:
    return value is not None


_TEXT = ("a text", _is_text)
_TEXTS = ("a list of texts", lambda v: isinstance(v, list) and all(map(_is_text, v)))
_MODEL = ("a model id of the Hub, owner/name", is_model_id)
KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "language": (
        "ISO 639 codes in small letters",
        _each(lambda v: isinstance(v, str) and LANGUAGE.fullmatch(v) is not None),
    ),
    "license": ("a licence id the Hub knows", _each(_one_of(LICENCES))),
    "license_name": _TEXT,
    "license_link": (
        f"an https address or {' or '.join(LICENCE_FILE_NAMES)}",
        lambda v: isinstance(v, str) and (v.startswith("https://") or v in LICENCE_FILE_NAMES),
    ),
    "library_name": _TEXT,
    "pipeline_tag": ("a task of the Hub for language models", _one_of(PIPELINE_TAGS)),
    "tags": _TEXTS,
    "metrics": _TEXTS,
    "datasets": ("dataset ids of the Hub", _each(is_model_id)),
    "base_model": (_MODEL[0], _each(is_model_id)),
    "base_model_relation": (f"one of {', '.join(RELATIONS)}", _one_of(RELATIONS)),
    "new_version": _MODEL,
    "model-index": ("results in the form the Hub reads, with numbers", _is_model_index),
    "widget": ("a list", lambda v: isinstance(v, list)),
    "inference": ("something", _is_given),
    "co2_eq_emissions": ("something", _is_given),
    "thumbnail": _TEXT,
    "extra_gated_heading": _TEXT,
    "extra_gated_description": _TEXT,
    "extra_gated_prompt": _TEXT,
    "extra_gated_button_content": _TEXT,
    "extra_gated_fields": ("a mapping", lambda v: isinstance(v, dict)),
}
"""Keys the Hub reads (hub-docs, modelcard.md, model-cards.md): what each holds, and the check."""
