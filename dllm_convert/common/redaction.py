"""Keep folders of the machine a checkpoint was made on out of what is published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SEPARATORS = re.compile(r"[/\\]")
# Spaces and brackets count as part of a name: better a word too many is cut than a folder's name
# is told. A comma does not where another path begins behind it.
_SIGN = r"(?:[\w.@+ ()\[\]{}!#%&=;^$-]|,(?!\s*(?:[/~\\]|\.{1,2}[/\\]|[A-Za-z]:)))"
_NAME = rf"[/\\]+{_SIGN}*[\w.@+*)\]}}!#%&=^$-]"
_FILE = r"(?:file:(?://[\w.-]*)?)"
_PATH = re.compile(
    rf"(?:{_FILE}|(?<![\w/\\.:~]))(?:(?:~|\.{{1,2}}|[A-Za-z]:)(?:{_NAME})+|(?:{_NAME}){{2,}})"
    r"[/\\]?"
)


def last_part(path: str) -> str:
    """Return the last part of a path of any system."""
    return _SEPARATORS.split(path.rstrip("/\\"))[-1]


def without_paths(text: str) -> str:
    """Cut the paths inside a sentence down to their last part; addresses stay whole."""
    return _PATH.sub(lambda found: last_part(found[0]) or found[0], text)


def public(value: Any) -> Any:
    """Return JSON-like data with the paths in all its texts cut down; a decoded sample stays."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {key: entry if key == "sample" else public(entry) for key, entry in value.items()}
    return [public(entry) for entry in value] if isinstance(value, list | tuple) else value
