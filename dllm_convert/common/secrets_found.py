"""Access tokens, keys and home folders in a text: what must not be published by accident."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.errors import IncompatibleError

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")

SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""Words in the names of variables that hold credentials."""
_SECRETS = {
    "an access token of the Hub": r"\bhf_[A-Za-z0-9]{16,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a token of GitLab": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key": r"\b(?:sk|rk|pk)-(?:[a-z]+-)*[A-Za-z0-9_]{20,}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a key of Google": r"\bAIza[0-9A-Za-z_-]{35}",
    "a token of Slack": r"\bxox[abeoprs]-[0-9A-Za-z-]{10,}",
    "a token of npm": r"\bnpm_[A-Za-z0-9]{36}",
    "a token of PyPI": r"\bpypi-[A-Za-z0-9_-]{50,}",
}
_SECRET = re.compile("|".join(f"(?P<s{n}>{p})" for n, p in enumerate(_SECRETS.values())))
_USERS = r"(?:/home/|/Users/|[A-Za-z]:\\+(?i:users|documents and settings)\\+)"
_NAME = r"[^\s/\\\"'`<>|:]+"
_ENDS = r"(?=[\"'`<>|]|\s|\Z)"
_HOME = re.compile(rf"{_USERS}{_NAME}[/\\]|(?<![\w.%-]){_USERS}{_NAME}{_ENDS}")
"""A folder of users and a name in it; with nothing below it, no part of an address either."""

_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([/nrt]))")


@dataclass(frozen=True)
class Finding:
    """Something in a text that is nobody else's business.

    Attributes:
        what: What it looks like.
        line: Line, counted from 1.
        found: The text itself; never to be shown.
    """

    what: str
    line: int
    found: str


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for code of others: without variables that hold credentials."""
    return {
        name: value
        for name, value in environment.items()
        if not any(word in name.upper() for word in SECRET_NAMES)
    }


def _known_tokens() -> Iterator[str]:
    values = (os.environ.get(name, "") for name in TOKEN_VARIABLES)
    yield from (value for value in values if len(value) >= 8)


def find_secrets(text: str) -> Iterator[Finding]:
    """Yield what looks like a credential, and the Hub's token of this process."""
    for found in _SECRET.finditer(text):
        number = int((found.lastgroup or "s0")[1:])
        yield Finding([*_SECRETS][number], _line(text, found.start()), found[0])
    for token in _known_tokens():
        at = text.find(token)
        if at >= 0 and not _SECRET.fullmatch(token):
            yield Finding("your access token of the Hub", _line(text, at), token)


def find_homes(text: str) -> Iterator[Finding]:
    """Yield paths in somebody's home folder, this user's own whatever it is called."""
    own = str(Path.home())
    for found in _HOME.finditer(text):
        yield Finding("a path in a home folder", _line(text, found.start()), found[0])
    if own.count("/") == 0 or own == "/" or _HOME.match(f"{own}/"):
        return
    # `/root` alone may be anything; a longer path is nobody else's.
    ends = rf"(?:/|{_ENDS})" if own.count("/") > 1 else "/"
    mine = re.search(re.escape(own) + ends, text)
    if mine is not None:
        yield Finding("a path in your home folder", _line(text, mine.start()), mine[0])


def unescaped(text: str) -> str:
    r"""Return a text as JSON, YAML and pages mean it: `\u002fhome` and `&#47;home` are `/home`.

    Its lines stay what they are: ends of lines that were written as escapes become spaces.
    """
    return html.unescape(_ESCAPE.sub(_meant, text)) if "\\" in text or "&" in text else text


def _meant(found: re.Match[str]) -> str:
    digits = found[1] or found[2] or found[3]
    if digits is None:
        return "/" if found[4] == "/" else " "
    code = int(digits, 16)
    return chr(code) if 0x20 <= code <= 0x10FFFF else " "


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def refuse_secrets(fields: Mapping[str, Any], origin: str = "the recipe") -> None:
    """Refuse a credential in a recipe: the checkpoint, its card and its report would carry it.

    Args:
        fields: The recipe as plain values.
        origin: What an error calls it.

    Raises:
        IncompatibleError: A text holds one; its field is named.
    """
    for name, value in _texts(fields):
        found = next(find_secrets(value), None)
        if found is not None:
            raise IncompatibleError(
                f"{name} of {origin} holds {found.what}, which would be written into the "
                "checkpoint and published with it",
                hint="Take it out: log in with `hf auth login`, or set HF_TOKEN",
            )


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry, name)
