"""The record of an export, dllm_export.json, as a push reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllm_convert.common.json_files import load_json_object
from dllm_convert.errors import DataError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in value.values()
    )


def _is_source(value: Any) -> bool:
    texts = ("license", "license_name", "license_link")
    return (
        isinstance(value, dict)
        and _is_text(value.get("name"))
        and all(value.get(key) is None or _is_text(value[key]) for key in texts)
        and _is_texts(value.get("language", []))
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_text(one) for one in value)


_FORM: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target": (_is_text, "the name of a layout"),
    "engines": (_is_texts, "names of engines"),
    "source": (_is_source, "what was exported: its name, licence and languages"),
    "files": (_is_hashes, "SHA-256 by file name"),
}


def read_record(path: Path) -> dict[str, Any]:
    """Read what an export says of itself.

    Raises:
        DataError: It is missing or broken, or something in it is of another kind.
    """
    record = load_json_object(path)
    for key, (fits, expected) in _FORM.items():
        if not fits(record.get(key)):
            raise DataError(
                f"{path}: {key} is not what export writes, expected {expected}",
                hint="Export it again",
            )
    if not isinstance(record.get("card", {}), dict):
        raise DataError(f"{path}: card is not what push writes", hint="Export it again")
    return record
