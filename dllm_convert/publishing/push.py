"""Publish a checkpoint: one commit of weights and card together, then the proof that it arrived."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import CARD_FILE
from dllm_convert.errors import DataError, HubError
from dllm_convert.publishing.confirm import confirm
from dllm_convert.publishing.options import PushOptions, PushResult
from dllm_convert.publishing.remote import (
    PushChanges,
    RemoteState,
    compare,
    keeps_card,
    read_remote,
    refuse_foreign,
)
from dllm_convert.publishing.repository import (
    Target,
    create,
    find_target,
    message,
    open_pull_request,
)
from dllm_convert.publishing.staged import Staged
from dllm_convert.source.hub_errors import (
    PRECONDITION_FAILED,
    first_line,
    hub_errors,
    is_passing,
    status_of,
    transport_error,
)

ATTEMPTS = 4
"""Times an upload is tried when the server or the connection fails; the client retries too."""
FIRST_PAUSE_S = 1.0


def upload(staged: Staged, options: PushOptions, scratch: Path, reporter: Reporter) -> PushResult:
    """Create the repository, send what is missing in one commit, and confirm it.

    Running it again after any interruption uploads only what is missing.

    Args:
        staged: What is to be published.
        options: Where and how; `repo_id` with its namespace.
        scratch: Work folder for downloads.
        reporter: Progress.

    Raises:
        HubError: The Hub refuses, cannot be reached, holds something else, or serves other bytes.
        DataError: The card breaks the Hub's rules.
        VerificationError: What was published does not load or decode.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    create(api, options, reporter)
    target = find_target(api, staged, options, reporter)
    commit, changes, remote = _send(api, staged, target, options, scratch, reporter)
    confirmed = confirm(
        target.repo_id, commit, staged.folder, staged.merged, scratch / "cache", reporter
    )
    if target.pull_request is not None:
        open_pull_request(api, target)
    return PushResult(
        target.repo_id,
        f"{api.endpoint}/{target.repo_id}",
        commit,
        f"{api.endpoint}/{target.repo_id}/commit/{commit}",
        target.page(api.endpoint),
        remote.private,
        changes.upload,
        changes.size,
        changes.delete,
        staged.card_kept,
        confirmed,
    )


def _send(
    api: Any,
    staged: Staged,
    target: Target,
    options: PushOptions,
    scratch: Path,
    reporter: Reporter,
) -> tuple[str, PushChanges, RemoteState]:
    """Commit what is missing; try again after a failure that may pass.

    Every try starts from what the repository holds by then: an answer that got lost after the
    commit was made is found out here, not committed twice.
    """
    first: PushChanges | None = None
    failures = 0
    with hub_errors(target.repo_id, target.revision, doing="write"):
        for _ in range(2 * ATTEMPTS):
            try:
                remote, changes = _survey(staged, target, options, scratch, reporter)
                first = changes if first is None else first
                if not changes:
                    return remote.commit, first, remote
                reporter.line(f"{len(changes.upload)} files, {changes.size:,} bytes to upload")
                with reporter.task(f"upload to {target.repo_id}"):
                    _commit(api, staged, target, options, remote, changes)
            except transport_error() as error:
                failures += 1
                stale = status_of(error) == PRECONDITION_FAILED
                if failures == ATTEMPTS or not (stale or is_passing(error)):
                    raise
                reporter.line(f"{first_line(error)}; trying again")
                time.sleep(FIRST_PAUSE_S * 2 ** (failures - 1))
    raise HubError(
        f"{target.repo_id} does not hold what was sent",
        hint="Somebody else may be writing to it; run the same command again later",
    )


def _survey(
    staged: Staged, target: Target, options: PushOptions, scratch: Path, reporter: Reporter
) -> tuple[RemoteState, PushChanges]:
    """Read the repository, settle which card it gets, and list what is missing there."""
    remote = read_remote(target.repo_id, target.revision, scratch / "manifest", staged.record_file)
    if staged.takes_the_place(remote, target.revision):
        return remote, compare(remote, staged.folder, staged.manifest)
    if keeps_card(remote) and not options.overwrite_card:
        if not staged.verified:
            raise HubError(
                f"the README.md of {target.repo_id} was written by a person and cannot say that "
                "this checkpoint is not verified",
                hint="Replace it with --overwrite-card",
            )
        if not staged.card_kept:
            reporter.warn(
                f"the README.md of {target.repo_id} was written by a person and is kept; "
                "--overwrite-card replaces it"
            )
        staged.keep_card(_read_card(remote, scratch))
    refuse_foreign(remote, staged.folder, staged.manifest)
    return remote, compare(remote, staged.folder, staged.manifest)


def _read_card(remote: RemoteState, scratch: Path) -> bytes:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        remote.repo_id, CARD_FILE, revision=remote.commit, cache_dir=scratch / "manifest"
    )
    return Path(path).read_bytes()


def _commit(
    api: Any,
    staged: Staged,
    target: Target,
    options: PushOptions,
    remote: RemoteState,
    changes: PushChanges,
) -> None:
    """Send everything in one call; the client leaves out what the Hub has already."""
    try:
        api.upload_folder(
            repo_id=target.repo_id,
            folder_path=staged.folder,
            revision=target.revision,
            commit_message=message(staged, options),
            commit_description=staged.description,
            delete_patterns=list(changes.delete) or None,
            parent_commit=remote.commit,
        )
    except ValueError as error:
        if "Invalid metadata in README.md" not in str(error):
            raise
        lines = [line.strip(" -") for line in str(error).splitlines()[1:] if line.strip()]
        raise DataError(
            f"the Hub refuses the card's metadata: {'; '.join(lines) or error}",
            hint="Correct README.md, or write it anew with `dllm-convert card`",
        ) from error
