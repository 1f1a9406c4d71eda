"""The repository a push goes to: who writes, and to which branch or pull request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dllm_convert.common.console import Reporter
from dllm_convert.errors import HubError
from dllm_convert.publishing.options import PushOptions
from dllm_convert.publishing.staged import Staged
from dllm_convert.source.hub_errors import hub_errors

DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class Target:
    """Where a commit goes.

    Attributes:
        repo_id: Repository.
        revision: Branch, or the ref of the pull request.
        pull_request: Its number, None for a branch.
    """

    repo_id: str
    revision: str
    pull_request: int | None = None

    def page(self, endpoint: str) -> str | None:
        """Return the address of the pull request, None if there is none."""
        if self.pull_request is None:
            return None
        return f"{endpoint}/{self.repo_id}/discussions/{self.pull_request}"


def full_id(repo_id: str) -> str:
    """Return a repository's id with its namespace, the user's own where none is given.

    Raises:
        HubError: Not logged in, a bad token, or an id the Hub would refuse.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils._validators import validate_repo_id

    with hub_errors(repo_id, doing="write"):
        validate_repo_id(repo_id)
        user = str(HfApi().whoami()["name"])
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def create(api: Any, options: PushOptions, reporter: Reporter) -> None:
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


def find_target(api: Any, staged: Staged, options: PushOptions, reporter: Reporter) -> Target:
    """Return where to commit: the branch, made if needed, or an open pull request of ours."""
    repo_id = options.repo_id
    with hub_errors(repo_id, options.revision, doing="write"):
        if options.create_pr:
            number = _pull_request(api, staged, options, reporter)
            return Target(repo_id, f"refs/pr/{number}", number)
        revision = options.revision or DEFAULT_REVISION
        if revision != DEFAULT_REVISION and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return Target(repo_id, revision)


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


def open_pull_request(api: Any, target: Target) -> None:
    """Take a pull request out of its draft state; one that is open stays so."""
    with hub_errors(target.repo_id, doing="write"):
        details = api.get_discussion_details(target.repo_id, target.pull_request)
        if details.status == "draft":
            api.change_discussion_status(target.repo_id, target.pull_request, "open")


def message(staged: Staged, options: PushOptions) -> str:
    """Return the first line of the commit."""
    return options.commit_message or f"Add {staged.title}"
