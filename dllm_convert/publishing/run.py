"""From a checkpoint folder to a repository: check, stage, document, upload, confirm."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_convert.card.licences import check_publication, rules_for
from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import sha256_file
from dllm_convert.common.manifest import CARD_FILE, checkpoint_files, read_manifest
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.common.work_folder import WORK, locked
from dllm_convert.errors import RequestError, VerificationError
from dllm_convert.publishing.adapter import adapter_checkpoint
from dllm_convert.publishing.exported import is_export, push_export
from dllm_convert.publishing.options import PushOptions, PushResult
from dllm_convert.publishing.push import upload
from dllm_convert.publishing.redaction import redact_folder
from dllm_convert.publishing.remote import base_name
from dllm_convert.publishing.repository import full_id
from dllm_convert.publishing.scan import check_staged
from dllm_convert.publishing.staged import Staged
from dllm_convert.publishing.staging import stage
from dllm_convert.verification.report import files_only


def push_checkpoint(folder: Path, options: PushOptions, reporter: Reporter) -> PushResult:
    """Publish a checkpoint that `run` wrote, or what `export` made of one.

    Args:
        folder: The checkpoint, or the export.
        options: Where and how.
        reporter: Progress.

    Raises:
        VerificationError: It was not verified, or failed; or what was published does not work.
        IncompatibleError: The base's licence does not allow it as asked.
        DataError: The folder is not what was verified, or its card is not sound.
        HubError: See `upload`.
    """
    if is_export(folder):
        return push_export(folder, options, reporter)
    if options.base_model is not None:
        raise RequestError(
            "`base_model` is for exports: a conversion names the base it was made from",
            argument="base_model",
        )
    manifest = read_manifest(folder)
    require_verified(manifest, force=options.force_unverified)
    options = preflight(manifest, options, reporter)
    with locked(folder):
        return push_locked(folder, options, reporter)


def preflight(manifest: Mapping[str, Any], options: PushOptions, reporter: Reporter) -> PushOptions:
    """Ask what can be asked before any work: who pushes, and whether the licence allows it.

    Args:
        manifest: Manifest of the checkpoint; of a run that has not started, its `source` section.
        options: Where and how.
        reporter: Warnings about the licence.

    Returns:
        The options with the full repository id.

    Raises:
        HubError: Not logged in, or a bad token.
        IncompatibleError: The licence of the base forbids it.
    """
    options = replace(options, repo_id=full_id(options.repo_id))
    for warning in licence_warnings(manifest, options):
        reporter.warn(warning)
    return options


def licence_warnings(manifest: Mapping[str, Any], options: PushOptions) -> tuple[str, ...]:
    """Return what the base's licence wants and is not there; asks nobody, so a dry run can.

    Args:
        manifest: As in `preflight`.
        options: Where and how.

    Raises:
        IncompatibleError: The licence of the base forbids it.
    """
    source = manifest["source"]
    return check_publication(
        rules_for(source.get("license"), source.get("license_name")),
        options.repo_id,
        public=options.public is True,
        files=manifest.get("files") or (),
    )


def require_verified(manifest: Mapping[str, Any], *, force: bool) -> bool:
    """Return whether a checkpoint is verified; refuse one that is not, unless forced.

    Raises:
        VerificationError: Its verification failed or never ran.
    """
    verification = manifest.get("verification")
    if verification and verification.get("passed") is True:
        return True
    if force:
        return False
    what = "failed its verification" if verification else "was never verified"
    raise VerificationError(
        f"the checkpoint {what}, and is not published",
        hint="See `dllm-convert verify`; --force-unverified publishes it with a card that says so",
    )


def push_locked(folder: Path, options: PushOptions, reporter: Reporter) -> PushResult:
    """Stage, document and upload a folder whose lock the caller holds.

    Raises:
        DllmConvertError: As `push_checkpoint`.
    """
    manifest = read_manifest(folder)
    scratch = folder / WORK / "push"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with quiet_libraries():
            staged = _stage(folder, scratch, manifest, options, reporter)
            return upload(staged, options, scratch, reporter)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _stage(
    folder: Path,
    scratch: Path,
    manifest: Mapping[str, Any],
    options: PushOptions,
    reporter: Reporter,
) -> Staged:
    from dllm_convert.card.readme import check_written_card, write_card
    from dllm_convert.common.version import __version__

    out = scratch / "files"
    if options.adapter_only:
        adapter_checkpoint(folder, out, reporter)
    else:
        stage(folder, out, reporter, max_shard_size=options.max_shard_size)
    redact_folder(out)
    if options.overwrite_card or options.adapter_only or not _card_edited(folder, manifest):
        (out / CARD_FILE).unlink(missing_ok=True)
        write_card(out, repo_id=options.repo_id)
    else:
        reporter.warn("README.md of the folder was edited and is published as it is")
        check_written_card(out)
    check_staged(out)
    verified, verdict = require_verified(manifest, force=True), "verified"
    if not verified:
        verdict = "NOT verified"
    elif files_only(manifest["verification"]):
        verdict = "only its files verified, the model never run"
        reporter.warn(
            "only the files of this checkpoint were verified and its model was never run: card and "
            "commit say so. A run with --verify full measures it"
        )
    name = options.repo_id.rpartition("/")[2]
    what = "LoRA adapter" if options.adapter_only else "Diffusion language model"
    description = (
        f"{what} made from {base_name(manifest['source'])} with dllm-convert {__version__}; "
        f"{len(checkpoint_files(out))} files, {verdict}."
    )
    return Staged(out, folder, name, description, verified)


def _card_edited(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a person changed the folder's README.md since it was generated."""
    path = folder / CARD_FILE
    recorded = (manifest.get("card") or {}).get("sha256")
    return recorded is not None and path.is_file() and sha256_file(path) != recorded
