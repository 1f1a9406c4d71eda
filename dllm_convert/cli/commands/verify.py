"""`verify`: probe a diffusion checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllm_convert.cli import options as option
from dllm_convert.cli import output
from dllm_convert.cli.commands.run import AllowPickle
from dllm_convert.cli.commands.shared import exit_if_failed, make_reporter, show_done
from dllm_convert.cli.types import count, named, path_of
from dllm_convert.cli.values import base_folder, output_file

if TYPE_CHECKING:
    from dllm_convert.common.console import Reporter
    from dllm_convert.verification.opening import Asked

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        parser=path_of,
        help="Folder or Hub id of a diffusion checkpoint, ours or of a known layout.",
        show_default=False,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against", metavar="SOURCE", parser=named, help="The base to compare the weights with."
    ),
]
Files = Annotated[
    bool,
    typer.Option(
        "--files", help="Only what files prove: the model is not loaded, whatever its size."
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        parser=path_of,
        help="Also write what was found as one HTML page, with pictures.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="REV", parser=named, help="Branch, tag or commit of a Hub id."
    ),
]
Block = Annotated[
    int | None,
    typer.Option(
        "--block",
        metavar="N",
        parser=count,
        help="Tokens per block of a third-party checkpoint that does not record them.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run modelling code of the checkpoint that this version did not write.",
        rich_help_panel="Dangerous options",
    ),
]


def verify(
    checkpoint: Checkpoint,
    against: Against = None,
    files: Files = False,
    allow_pickle: AllowPickle = False,
    report: Report = None,
    revision: Revision = None,
    block: Block = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Check a diffusion checkpoint: files, tensors, mask token, attention, decoding."""
    output_file(report, (".html",), "--report")
    if report is not None and files:
        raise typer.BadParameter("--report shows what the model does; leave --files out")
    reporter = make_reporter(quiet=quiet or as_json)
    if files:
        from dllm_convert.verification.bytes import verify_folder

        base = base_folder(against, reporter, allow_pickle=allow_pickle) if against else None
        found = verify_folder(checkpoint, base, reporter).as_dict()
        show_done(found, output.verification_table, as_json=as_json)
        exit_if_failed(found)
        return
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.verification import verify_checkpoint

    with quiet_libraries():
        base = base_folder(against, reporter, allow_pickle=allow_pickle) if against else None
        document = verify_checkpoint(
            checkpoint,
            revision=revision,
            against=base,
            trust_remote_code=trust_remote_code,
            block_size=block,
            reporter=reporter,
        ).as_dict()
        if report is not None:
            from dllm_convert.verification.opening import Asked, local_checkpoint

            folder = local_checkpoint(checkpoint, revision, reporter)
            asked = Asked(base, trust_remote_code=trust_remote_code, block_size=block)
            document = document | _write(report, folder, asked, document, reporter)
    show_done(document, output.verify_text, as_json=as_json)
    exit_if_failed(document)


def _write(
    path: Path, folder: Path, asked: Asked, verification: dict[str, Any], reporter: Reporter
) -> dict[str, Any]:
    """Measure what the report's pictures show, and write it."""
    from dllm_convert.card.report import write_report
    from dllm_convert.verification.observe.views import observe_checkpoint

    with reporter.task("measure what the pictures show"):
        seen = observe_checkpoint(folder, asked, verification)
    write_report(folder, path, verification=verification, seen=seen)
    return {"report": str(path), "measurements": seen.as_dict()}
