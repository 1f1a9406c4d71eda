"""What tokenizer_config.json and its older companions say of tokens: kinds that transformers takes.

What it refuses only when the tokenizer is loaded is refused here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dllm_convert.common.shown_text import shown
from dllm_convert.errors import DataError

_FLAGS = ("split_special_tokens",)
_LISTS = ("extra_special_tokens", "additional_special_tokens")


def check_settings(settings: Mapping[str, Any], file: str, roles: Collection[str]) -> None:
    """Check the settings that a tokenizer is built from.

    Args:
        settings: Content of the file.
        file: Its name.
        roles: Names of special tokens, such as `eos`.

    Raises:
        DataError: A setting is of another kind.
    """
    for role in roles:
        value = settings.get(f"{role}_token")
        content = value.get("content") if isinstance(value, Mapping) else value
        if value is not None and not isinstance(content, str):
            raise _wrong(
                file, f"{role}_token", value, "a text, an object with its content, or null"
            )
    limit = settings.get("model_max_length")
    if limit is not None and not (type(limit) in (int, float) and limit > 0):
        raise _wrong(file, "model_max_length", limit, "a number above 0")
    for name in _LISTS:
        if settings.get(name) is not None and not isinstance(settings[name], list | Mapping):
            raise _wrong(file, name, settings[name], "a list of tokens, or null")
    for name in _FLAGS:
        if name in settings and not isinstance(settings[name], bool):
            raise _wrong(file, name, settings[name], "true or false")
    declared = settings.get("tokenizer_class")
    if declared is not None and not isinstance(declared, str):
        raise _wrong(file, "tokenizer_class", declared, "the name of a class, or null")


def _wrong(file: str, name: str, value: object, expected: str) -> DataError:
    return DataError(
        f"{file}: {name} is {shown(value)}, expected {expected}",
        hint="Correct it, or save the tokenizer again with save_pretrained",
    )
