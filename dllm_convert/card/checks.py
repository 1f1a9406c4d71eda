"""Is the metadata of a card that a person wrote what the Hub reads? Checked before a byte is sent.

Values are the Hub's to validate, which it does before anything is uploaded. It knows no unknown
keys: a typo such as `licence` is a key nobody reads.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dllm_convert.common.hub_names import LICENCE_FILE_NAMES, METADATA_KEYS
from dllm_convert.errors import DataError

_FRONT = re.compile(r"---[ \t]*\n(.*?\n)---[ \t]*(?:\n|$)", re.DOTALL)


def check_metadata(text: str, folder: Path) -> None:
    """Check a card's metadata; a key of one's own is let through, unless it is nearly the Hub's.

    Args:
        text: README.md.
        folder: The checkpoint.

    Raises:
        DataError: The Hub would refuse it or not read it; every problem is named.
    """
    _, problems = metadata_problems(split(text)[0], folder)
    if problems:
        raise DataError(
            f"the model card of {folder} is not sound: {'; '.join(problems)}",
            hint="Correct README.md, or write it anew with `dllm-convert card`",
        )


def split(text: str) -> tuple[str | None, str]:
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


def metadata_problems(front: str | None, folder: Path) -> tuple[dict[Any, Any], list[str]]:
    """Return the metadata, empty if it cannot be read, and what is wrong with it.

    Args:
        front: YAML; None if there is none.
        folder: The checkpoint.
    """
    if front is None:
        return {}, ["it does not begin with metadata between two lines of ---"]
    try:
        content = yaml.load(front, Loader=_Loader)  # noqa: S506 -- derived from SafeLoader
    except yaml.YAMLError as error:
        return {}, [f"its metadata is not YAML ({' '.join(str(error).split())})"]
    if not isinstance(content, dict):
        return {}, ["its metadata is not a mapping"]
    return content, [*_mistyped(content), *_contradictions(content, folder)]


def _mistyped(content: Mapping[Any, Any]) -> Iterator[str]:
    for key in content.keys() - set(METADATA_KEYS):
        near = difflib.get_close_matches(str(key), METADATA_KEYS, n=1, cutoff=0.8)
        if near:
            yield f"metadata {key!r} is not a key the Hub reads, perhaps {near[0]} is meant"


def _contradictions(content: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yield what is wrong between keys, or between a key and the folder."""
    if content.get("license") == "other" and not content.get("license_name"):
        yield "metadata license: other needs license_name"
    if "base_model_relation" in content and "base_model" not in content:
        yield "metadata base_model_relation needs base_model"
    link = content.get("license_link")
    if link in LICENCE_FILE_NAMES and not (folder / link).is_file():
        yield f"metadata license_link: the folder has no {link}"
