"""A verification as a page: what its pictures show is measured, and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.console import Reporter
from dllm_convert.common.tables import Block, apart
from dllm_convert.verification.report import VerificationReport

if TYPE_CHECKING:
    from dllm_convert.verification.observe.observations import Observations
    from dllm_convert.verification.opening import VerificationRequest


@dataclass(frozen=True)
class ReportWithPage(VerificationReport):
    """A verification of which a page was written.

    Attributes:
        page: The file.
        seen: What its pictures show.
    """

    page: Path | None = None
    seen: Observations | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report with the page and what it shows."""
        seen = {} if self.seen is None else self.seen.as_dict()
        return super().as_dict() | {"report": str(self.page), "measurements": seen}

    def as_blocks(self) -> list[Block]:
        """Return the probes and, as text, the pictures."""
        from dllm_convert.card.tables import views_of

        seen = views_of(self.as_dict())
        return [*super().as_blocks(), "", *apart([*seen, f"Report: {self.page}"])]


def write_page(
    path: Path,
    folder: Path,
    asked: VerificationRequest,
    report: VerificationReport,
    reporter: Reporter,
) -> ReportWithPage:
    """Measure what the report's pictures show, and write it."""
    from dllm_convert.card.report import write_report
    from dllm_convert.verification.observe.views import observe_checkpoint

    found = report.as_dict()
    with reporter.task("measure what the pictures show"):
        seen = observe_checkpoint(folder, asked, found)
    write_report(folder, path, verification=found, seen=seen)
    return ReportWithPage(report.probes, report.seconds, report.groups, page=path, seen=seen)
