"""Is a card one the Hub takes and a reader can use? Checked before a byte is sent.

The Hub's validation of the metadata, which a push runs into anyway, knows no unknown keys: a typo
such as `licence` is a key nobody reads. It does not look at the text below at all.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dllm_convert.card.markdown import markdown_problems
from dllm_convert.common.hub_names import (
    LANGUAGE,
    LICENCE_FILE_NAMES,
    LICENCES,
    PIPELINE_TAGS,
    RELATIONS,
    is_model_id,
)
from dllm_convert.errors import DataError

_FRONT = re.compile(r"---[ \t]*\n(.*?\n)---[ \t]*(?:\n|$)", re.DOTALL)


def check_card(text: str, folder: Path) -> None:
    """Check a card's metadata and its Markdown.

    Args:
        text: README.md.
        folder: The checkpoint, for what the card links to.

    Raises:
        DataError: Something is wrong; every problem is named.
    """
    front, body = _split(text)
    _raise([*_metadata_problems(front, folder), *markdown_problems(body, folder)], folder)


def check_metadata(text: str, folder: Path) -> None:
    """Check the metadata only, as for a card that a person wrote.

    A key the Hub does not know is let through there, unless it is nearly one that it does.

    Args:
        text: README.md.
        folder: The checkpoint.

    Raises:
        DataError: The Hub would refuse it or not read it; every problem is named.
    """
    _raise(list(_metadata_problems(_split(text)[0], folder, own=False)), folder)


def _raise(problems: list[str], folder: Path) -> None:
    if problems:
        raise DataError(
            f"the model card of {folder} is not sound: {'; '.join(problems)}",
            hint="Correct README.md, or write it anew with `dllm-convert card`",
        )


def _split(text: str) -> tuple[str | None, str]:
    """Return the metadata, None if there is none, and the text below it."""
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n")
    found = _FRONT.match(plain)
    return (found[1], plain[found.end() :]) if found else (None, plain)


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once; of two the second would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping.

        Raises:
            yaml.constructor.ConstructorError: A key stands twice.
        """
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} stands there twice")
        return super().construct_mapping(node, deep)


def _metadata_problems(front: str | None, folder: Path, *, own: bool = True) -> Iterator[str]:
    if front is None:
        yield "it does not begin with metadata between two lines of ---"
        return
    try:
        content = yaml.load(front, Loader=_Loader)  # noqa: S506 -- derived from SafeLoader
    except yaml.YAMLError as error:
        yield f"its metadata is not YAML ({' '.join(str(error).split())})"
        return
    if not isinstance(content, dict):
        yield "its metadata is not a mapping"
        return
    for key, value in content.items():
        near = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.8)
        if key in _KEYS:
            expected, fits = _KEYS[key]
            if not fits(value):
                yield f"metadata {key}: {value!r} is not {expected}"
        elif own or near:
            meant = f", perhaps {near[0]} is meant" if near else ""
            yield f"metadata {key!r} is not a key the Hub reads{meant}"
    yield from _contradictions(content, folder)


def _contradictions(content: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yield what is wrong between keys, or between a key and the folder."""
    if content.get("license") == "other" and not content.get("license_name"):
        yield "metadata license: other needs license_name"
    if "base_model_relation" in content and "base_model" not in content:
        yield "metadata base_model_relation needs base_model"
    link = content.get("license_link")
    if link in LICENCE_FILE_NAMES and not (folder / link).is_file():
        yield f"metadata license_link: the folder has no {link}"


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
_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
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
