"""Document a converted checkpoint, and put it on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.console import Reporter
from dllm_convert.common.tables import Block, Printed
from dllm_convert.errors import RequestError

if TYPE_CHECKING:
    from dllm_convert.publishing import PushOptions, PushResult


@dataclass(frozen=True)
class Documents(Printed):
    """What people read of a checkpoint.

    Attributes:
        path: README.md, the model card.
        report: report.html.
    """

    path: Path
    report: Path

    def as_dict(self) -> dict[str, Any]:
        """Return what `card --json` prints."""
        return {"path": str(self.path), "report": str(self.report)}

    def as_blocks(self) -> list[Block]:
        """Return the path of the card."""
        return [str(self.path)]


def write_card(checkpoint: str | Path) -> Documents:
    """Write README.md, the model card, and report.html of a converted checkpoint anew.

    Args:
        checkpoint: The folder.

    Raises:
        DataError: The folder has no manifest of ours, or cannot be written.
    """
    from dllm_convert.card import readme
    from dllm_convert.card.report import write_report

    # The card links to the report where there is one.
    report = write_report(Path(checkpoint))
    return Documents(readme.write_card(Path(checkpoint)), report)


def push_options(
    repo_id: str, *, max_shard_size: int | str | None = None, **given: Any
) -> PushOptions:
    """Return where and how to publish.

    Args:
        repo_id: Repository.
        max_shard_size: Bytes per weight file, or text as `"5GB"`.
        **given: Other fields of `PushOptions`.

    Raises:
        RequestError: They contradict each other.
    """
    from dllm_convert.publishing import PushOptions
    from dllm_convert.publishing.reshard import parse_size

    if given.get("create_pr") and given.get("revision"):
        raise RequestError("give `create_pr` or `revision`, a pull request has its own")
    try:
        size = parse_size(str(max_shard_size)) if max_shard_size else None
    except ValueError as error:
        raise RequestError(str(error), argument="max_shard_size") from error
    return PushOptions(repo_id, max_shard_size=size, **given)


def push(
    checkpoint: str | Path,
    repo_id: str | PushOptions,
    *,
    reporter: Reporter | None = None,
    **options: Any,
) -> PushResult:
    """Publish a converted checkpoint on the Hub, and check what arrived there.

    Args:
        checkpoint: The folder.
        repo_id: `namespace/name`, or a name in your own.
        reporter: Progress; None tells it on stderr.
        **options: `public`, `revision`, `create_pr`, `commit_message`, `max_shard_size`,
            `overwrite_card`, `adapter_only`, `force_unverified`; see `PushOptions`.

    Raises:
        VerificationError: It was not verified, or failed; or what was published does not work.
        IncompatibleError: The base's licence does not allow it as asked.
        HubError: The Hub refuses it or cannot be reached.
    """
    from dllm_convert.publishing import push_checkpoint

    asked = push_options(repo_id, **options) if isinstance(repo_id, str) else repo_id
    return push_checkpoint(Path(checkpoint), asked, reporter or Reporter())
