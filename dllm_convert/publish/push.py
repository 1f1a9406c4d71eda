"""Publish a checkpoint: one commit of weights and card together, then the proof that it arrived."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dllm_convert.console import Reporter
from dllm_convert.errors import DataError, HubError
from dllm_convert.hub_errors import (
    PRECONDITION_FAILED,
    hub_errors,
    is_passing,
    status_of,
    transport_error,
)
from dllm_convert.publish.confirm import Confirmation, confirm
from dllm_convert.publish.remote import (
    CARD_FILE,
    Changes,
    RemoteState,
    compare,
    keeps_card,
    read_remote,
    refuse_foreign,
)
from dllm_convert.publish.staged import Staged

ATTEMPTS = 4
"""Times an upload is tried when the server or the connection fails; the client retries too."""
FIRST_PAUSE_S = 1.0
DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class PushOptions:
    """Where and how to publish.

    Attributes:
        repo_id: `namespace/name`, or `name` for the user's own namespace.
        public: True or False to ask for it, None for private where the repository is new.
        revision: Branch to push to; made if it does not exist. None is `main`.
        create_pr: Propose the files in a pull request.
        commit_message: First line of the commit and title of the pull request.
        max_shard_size: Bytes per weight file, None to leave the files as they are.
        overwrite_card: Replace a README.md that a person wrote or edited.
        adapter_only: Publish the LoRA adapter instead of the merged weights.
        force_unverified: Publish what failed verification or was never verified.
    """

    repo_id: str
    public: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    max_shard_size: int | None = None
    overwrite_card: bool = False
    adapter_only: bool = False
    force_unverified: bool = False


@dataclass(frozen=True)
class PushResult:
    """What was published.

    Attributes:
        repo_id: Repository.
        url: Its page.
        commit: Commit that holds it, 40 hex digits.
        commit_url: Page of that commit.
        pull_request: Page of the pull request, None if there is none.
        private: Whether the repository is private.
        uploaded: Files that were missing or different.
        uploaded_bytes: Their bytes.
        deleted: Files of an earlier push that were removed.
        card_kept: Whether a README.md that a person wrote was kept.
        confirmed: What was downloaded and checked afterwards.
    """

    repo_id: str
    url: str
    commit: str
    commit_url: str
    pull_request: str | None
    private: bool
    uploaded: tuple[str, ...]
    uploaded_bytes: int
    deleted: tuple[str, ...]
    card_kept: bool
    confirmed: Confirmation

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class _Target:
    repo_id: str
    revision: str
    pull_request: int | None = None

    def page(self, endpoint: str) -> str | None:
        if self.pull_request is None:
            return None
        return f"{endpoint}/{self.repo_id}/discussions/{self.pull_request}"


def who_am_i(repo_id: str) -> tuple[str, str]:
    """Return the user's name and the repository's full id.

    Raises:
        HubError: Not logged in, a bad token, or an id the Hub would refuse.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils._validators import validate_repo_id

    with hub_errors(repo_id, doing="write"):
        validate_repo_id(repo_id)
        user = str(HfApi().whoami()["name"])
    return user, repo_id if "/" in repo_id else f"{user}/{repo_id}"


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
    _create(api, options, reporter)
    target = _target(api, staged, options, reporter)
    commit, changes, remote = _send(api, staged, target, options, scratch, reporter)
    confirmed = confirm(
        target.repo_id, commit, staged.folder, staged.merged, scratch / "cache", reporter
    )
    if target.pull_request is not None:
        _open_pull_request(api, target)
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


def _create(api: Any, options: PushOptions, reporter: Reporter) -> None:
    """Make the repository, private unless asked otherwise; one that exists keeps its visibility."""
    repo_id = options.repo_id
    with hub_errors(repo_id, doing="write"):
        if not options.create_pr or not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=options.public is not True, exist_ok=True)
        private = bool(api.model_info(repo_id).private)
    if options.public is False and not private:
        raise HubError(
            f"{repo_id} exists and is public, --private was asked for",
            hint=f"Make it private with `hf repos settings {repo_id} --private`, or leave it out",
        )
    if options.public and private:
        reporter.warn(f"{repo_id} exists and stays private; its settings page can make it public")


def _target(api: Any, staged: Staged, options: PushOptions, reporter: Reporter) -> _Target:
    """Return where to commit: the branch, made if needed, or an open pull request of ours."""
    repo_id = options.repo_id
    with hub_errors(repo_id, options.revision, doing="write"):
        if options.create_pr:
            number = _pull_request(api, staged, options, reporter)
            return _Target(repo_id, f"refs/pr/{number}", number)
        revision = options.revision or DEFAULT_REVISION
        if revision != DEFAULT_REVISION and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return _Target(repo_id, revision)


def _pull_request(api: Any, staged: Staged, options: PushOptions, reporter: Reporter) -> int:
    """Return an open pull request of the user with this title, or a new one.

    An interrupted push is thus gone on with in its own pull request, from any machine. The draft is
    made explicitly: committing with `create_pr` opens a second one when an answer is lost.
    """
    user = str(api.whoami()["name"])
    title = message(staged, options)
    for found in api.get_repo_discussions(options.repo_id, author=user):
        ours = found.is_pull_request and found.title == title
        if ours and found.status in ("open", "draft"):
            reporter.line(f"going on in pull request {found.num}")
            return int(found.num)
    made = api.create_pull_request(options.repo_id, title=title, description=staged.description)
    return int(made.num)


def _open_pull_request(api: Any, target: _Target) -> None:
    with hub_errors(target.repo_id, doing="write"):
        details = api.get_discussion_details(target.repo_id, target.pull_request)
        if details.status == "draft":
            api.change_discussion_status(target.repo_id, target.pull_request, "open")


def message(staged: Staged, options: PushOptions) -> str:
    """Return the first line of the commit."""
    return options.commit_message or f"Add {staged.title}"


def _send(
    api: Any,
    staged: Staged,
    target: _Target,
    options: PushOptions,
    scratch: Path,
    reporter: Reporter,
) -> tuple[str, Changes, RemoteState]:
    """Commit what is missing; try again after a failure that may pass.

    Every try starts from what the repository holds by then: an answer that got lost after the
    commit was made is found out here, not committed twice.
    """
    first: Changes | None = None
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
                reporter.line(f"{_first_line(error)}; trying again")
                time.sleep(FIRST_PAUSE_S * 2 ** (failures - 1))
    raise HubError(
        f"{target.repo_id} does not hold what was sent",
        hint="Somebody else may be writing to it; run the same command again later",
    )


def _survey(
    staged: Staged, target: _Target, options: PushOptions, scratch: Path, reporter: Reporter
) -> tuple[RemoteState, Changes]:
    """Read the repository, settle which card it gets, and list what is missing there."""
    remote = read_remote(target.repo_id, target.revision, scratch / "manifest")
    if keeps_card(remote) and not options.overwrite_card:
        if not staged.verified:
            raise HubError(
                f"the README.md of {target.repo_id} was written by a person and cannot say that "
                "this checkpoint is not verified",
                hint="Replace it with --overwrite-card",
            )
        staged.keep_card(_read_card(remote, scratch))
        reporter.warn(
            f"the README.md of {target.repo_id} was written by a person and is kept; "
            "--overwrite-card replaces it"
        )
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
    target: _Target,
    options: PushOptions,
    remote: RemoteState,
    changes: Changes,
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


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
