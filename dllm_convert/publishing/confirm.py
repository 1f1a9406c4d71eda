"""After a push: is what the Hub serves what was sent, and does it work for a stranger?"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.adapters import adapter_of
from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import sha256_file
from dllm_convert.common.disk import writing
from dllm_convert.common.manifest import (
    EXPORT_FILE,
    MANIFEST_FILE,
    WRITTEN_LAST,
    changed_files,
    read_manifest,
)
from dllm_convert.errors import HubError, VerificationError
from dllm_convert.publishing.adapter import check_adapter
from dllm_convert.publishing.export_record import read_record
from dllm_convert.source.folder import read_config
from dllm_convert.source.hub_errors import hub_errors
from dllm_convert.verification.report import files_only

GROUPS = ("tokens", "portability", "generate")
"""Probes of the short verification: it loads from the Hub, alone, and decodes."""


@dataclass(frozen=True)
class Confirmation:
    """What was checked after a push.

    Attributes:
        files: Files downloaded and compared.
        size: Their bytes.
        probes: Probes run on the download, with their results.
    """

    files: int
    size: int
    probes: tuple[dict[str, Any], ...]


def confirm(
    repo_id: str, commit: str, staged: Path, merged: Path, scratch: Path, reporter: Reporter
) -> Confirmation:
    """Download a commit into a fresh cache, compare every file, load it from there and run it.

    Args:
        repo_id: Repository.
        commit: Commit the push returned.
        staged: What was sent.
        merged: The checkpoint it was made from.
        scratch: Folder for the fresh cache; emptied before and after.
        reporter: Progress.

    Raises:
        HubError: The download fails, or a file differs from what was sent.
        VerificationError: It does not load or does not decode.
    """
    # The staged files were compared with these hashes: they are not read once more.
    export = not (staged / MANIFEST_FILE).is_file()
    known = read_record(staged / EXPORT_FILE) if export else read_manifest(staged)
    hashes = known["files"] | {
        name: sha256_file(staged / name)
        for name in (*WRITTEN_LAST, EXPORT_FILE)
        if (staged / name).is_file()
    }
    size = sum((staged / name).stat().st_size for name in hashes)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with writing(scratch, size), reporter.task("download what was published"):
            folder = download(repo_id, commit, scratch)
        with reporter.task("compare every file"):
            wrong = sorted(changed_files(folder, hashes))
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise HubError(
                f"{wrong[0]}{more} at {repo_id}@{commit[:12]} differs from what was sent",
                hint="Run the same command again: it uploads what differs",
            )
        # An export is for an engine: it was compared with its conversion, byte for byte.
        probes = () if export else short_verification(folder, merged, scratch, reporter)
        _raise_failed(probes)
        return Confirmation(len(hashes), size, probes)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def download(repo_id: str, commit: str, cache: Path) -> Path:
    """Download all files of a commit into a cache of its own and return the snapshot's folder.

    Raises:
        HubError: The Hub cannot be reached or refuses.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id, commit):
        return Path(snapshot_download(repo_id, revision=commit, cache_dir=cache))


def short_verification(
    folder: Path, merged: Path, scratch: Path, reporter: Reporter
) -> tuple[dict[str, Any], ...]:
    """Load a downloaded checkpoint as a stranger would, and decode with it.

    An adapter is put on its base and compared with the merged weights. Of a checkpoint whose files
    only were verified, because its model is too large or nobody asked, files only are looked at.

    Returns:
        Probes with their results.
    """
    manifest = read_manifest(folder)
    if manifest.get("adapter_only"):
        return (check_adapter(folder, merged, scratch, reporter),)
    if files_only(manifest.get("verification")):
        return _files_verification(folder, reporter)
    from dllm_convert.verification import verify_checkpoint
    from dllm_convert.verification.run import GROUPS as ALL

    report = verify_checkpoint(folder, groups=GROUPS, reporter=reporter).as_dict()
    not_asked = set(ALL) - set(GROUPS)
    return tuple(probe for probe in report["probes"] if probe["name"] not in not_asked)


def _files_verification(folder: Path, reporter: Reporter) -> tuple[dict[str, Any], ...]:
    """Look at headers, index and mask row of a download whose files were compared already."""
    from dllm_convert.verification.bytes import verify_bytes

    config = read_config(folder)
    reason = "the model was not loaded before the push either"
    with reporter.task("verify the published files"):
        report = verify_bytes(
            folder, config, adapter_of(config), against=None, hashed=True, reason=reason
        ).as_dict()
    return tuple(probe for probe in report["probes"] if probe["passed"] is not None)


def _raise_failed(probes: tuple[dict[str, Any], ...]) -> None:
    for probe in probes:
        if probe["passed"] is False:
            raise VerificationError(
                f"what was published does not work: {probe['name']} measured {probe['measured']}, "
                f"required {probe['required']}",
                hint="Keep the repository private, run `dllm-convert verify` on the folder, and "
                "push again",
            )
