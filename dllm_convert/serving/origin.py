"""What an export has to say of the conversion it came from when it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_convert.common.manifest import MANIFEST_FILE, read_manifest

_KEPT = ("license", "license_name", "license_link", "language")


def conversion_facts(folder: Path) -> dict[str, Any]:
    """Return the licence and languages of a conversion's base, and whether it was verified.

    Args:
        folder: The conversion; one without a manifest says nothing.

    Raises:
        DataError: Its manifest is broken.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return {}
    manifest = read_manifest(folder)
    source = manifest.get("source") or {}
    verification = manifest.get("verification") or {}
    return {
        **{key: source[key] for key in _KEPT if source.get(key)},
        "verified": verification.get("passed") is True,
    }
