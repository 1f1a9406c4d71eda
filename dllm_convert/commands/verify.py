"""`verify`: probe a diffusion checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllm_convert import cli_options as option
from dllm_convert import cli_output as output
from dllm_convert.cli_values import base_folder
from dllm_convert.commands.shared import exit_if_failed, make_reporter

if TYPE_CHECKING:
    from dllm_convert.console import Reporter

Against = Annotated[
    str | None,
    typer.Option("--against", metavar="SOURCE", help="The base to compare the weights with."),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        dir_okay=False,
        help="Also write what was found as one HTML page, with pictures.",
    ),
]


def verify(
    checkpoint: option.Checkpoint,
    against: Against = None,
    report: Report = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Check a converted checkpoint: files, tensors, mask token, attention, decoding."""
    if report is not None and not report.resolve().parent.is_dir():
        raise typer.BadParameter(f"{report.parent} is no folder", param_hint="--report")
    reporter = make_reporter(quiet=quiet or as_json)
    from dllm_convert.quiet import quiet_libraries
    from dllm_convert.verify import verify_checkpoint

    with quiet_libraries():
        base = base_folder(against, reporter) if against else None
        document = verify_checkpoint(checkpoint, against=base, reporter=reporter).as_dict()
        if report is not None:
            document = document | _write(report, checkpoint, base, document, reporter)
    output.show(document, output.verify_text, as_json=as_json)
    exit_if_failed(document)


def _write(
    path: Path,
    checkpoint: Path,
    base: Path | None,
    verification: dict[str, Any],
    reporter: Reporter,
) -> dict[str, Any]:
    """Measure what the report's pictures show, and write it."""
    from dllm_convert.report_page import write_report
    from dllm_convert.verify.views import observe_checkpoint

    with reporter.task("measure what the pictures show"):
        seen = observe_checkpoint(checkpoint, base, verification)
    write_report(checkpoint, path, verification=verification, seen=seen)
    return {"report": str(path), "measurements": seen.as_dict()}
