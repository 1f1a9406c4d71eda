"""The base that a manifest says a checkpoint was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.errors import DataError
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.inspect import inspect_source


def recorded_base(manifest: Mapping[str, Any], base: str | None = None) -> SourceInfo:
    """Return the base, which has to be the one that was converted.

    Args:
        manifest: The checkpoint's dllm_convert.json.
        base: Where it is, if it is not where it was.

    Raises:
        DataError: It is not here, or another one.
    """
    recorded = manifest["source"]
    given = base or recorded.get("repo_id") or recorded["given"]
    if base is None and not recorded.get("repo_id") and not Path(given).exists():
        raise DataError(
            f"the base {Path(given).name} is not here any more", hint="Give it with --base FOLDER"
        )
    source = inspect_source(given, revision=None if base else recorded.get("revision"))
    known, found = recorded.get("fingerprint"), dict(source.fingerprint)
    if known and known.keys() == found.keys() and known != found:
        raise DataError(
            f"{given} is not the base that was converted: its files are others",
            hint="Give that one with --base",
        )
    return source
