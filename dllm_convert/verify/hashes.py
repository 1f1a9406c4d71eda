"""Hashes: the files are those that the manifest lists, and whatever is loaded is listed."""

from __future__ import annotations

from pathlib import Path

from dllm_convert.manifest import MANIFEST_FILE, changed_files, listing_faults, read_manifest
from dllm_convert.verify.report import Probe, first_items, skipped

REQUIRED = "0, and every file that is loaded is listed"


def hashes_probe(folder: Path) -> Probe:
    """Return the probe `hashes` of a checkpoint folder.

    Raises:
        DataError: The manifest is not JSON.
    """
    if not (folder / MANIFEST_FILE).exists():
        return skipped("hashes", REQUIRED, "the folder has no manifest with hashes")
    manifest = read_manifest(folder)
    wrong = listing_faults(folder, manifest)
    hashes = manifest.get("files")
    hashes = hashes if isinstance(hashes, dict) else {}
    differing = changed_files(folder, hashes)
    return Probe(
        "hashes",
        not (wrong or differing),
        f"{len(differing)} of {len(hashes)} files differ",
        REQUIRED,
        first_items({**differing, **wrong}),
    )
