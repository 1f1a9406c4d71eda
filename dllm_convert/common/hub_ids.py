"""Which sources are ids of the Hub: what is no path here, and could be a name there."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PATH_STARTS = ("/", "./", "../", "~", ".\\", "..\\")


def is_hub_id(source: str) -> bool:
    """Whether a source is an id of the Hub, as in owner/name: what exists here is meant itself."""
    looks_local = source.startswith(_PATH_STARTS) or source.endswith(".gguf")
    if looks_local or os.sep * 2 in source or not _HUB_ID.fullmatch(source):
        return False
    return not Path(source).expanduser().exists()
