"""Where and how to publish, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dllm_convert.common.tables import Block, Printed
from dllm_convert.publishing.confirm import Confirmation
from dllm_convert.publishing.shown import push_lines


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
        base_model: Of an export for an engine, the repository of its conversion; None: the one that
            it becomes a revision of.
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
    base_model: str | None = None


@dataclass(frozen=True)
class PushResult(Printed):
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

    def as_blocks(self) -> list[Block]:
        """Return what went up, what was checked and where it is."""
        return push_lines(self.as_dict())
