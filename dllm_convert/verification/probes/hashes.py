"""Hashes: the files are those that the manifest lists, and whatever is loaded is listed."""

from __future__ import annotations

from pathlib import Path

from dllm_convert.common.manifest import MANIFEST_FILE, changed_files, listing_faults, read_manifest
from dllm_convert.verification.report import Probe, first_items, skipped

REQUIRED = "0, and every file that is loaded is listed"


def hashes_probe(folder: Path) -> Probe:
    """Return the probe `hashes` of a checkpoint folder.

    Raises:
        DataError: The manifest is not JSON.
    """
    if not (folder / MANIFEST_FILE).exists():
        return skipped("hashes", REQUIRED, "the folder has no manifest with hashes")
    manifest = read_manifest(folder, any_version=True)
    wrong = listing_faults(folder, manifest)
    hashes = manifest.get("files")
    hashes = hashes if isinstance(hashes, dict) else {}
    differing = changed_files(folder, hashes)
    measured = f"{len(differing)} of {len(hashes)} files differ"
    others = len(wrong.keys() - differing.keys())
    if others:
        measured += f", {others} fault{'s' if others > 1 else ''} of the list"
    found = {**differing, **wrong}
    if found:
        # What is measured is all that the closing error of a command has of a probe.
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        measured += f" ({next(iter(found))}{more})"
    return Probe(
        "hashes",
        not found,
        measured,
        REQUIRED,
        first_items(found),
    )
