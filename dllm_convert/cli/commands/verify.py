"""`verify`: probe a diffusion checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dllm_convert.cli import options as option
from dllm_convert.cli.commands.shared import exit_if_failed, make_reporter, show_done, typed
from dllm_convert.cli.types import count, named, path_of
from dllm_convert.cli.values import output_file

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
    allow_pickle: option.AllowPickle = False,
    report: Report = None,
    revision: option.Revision = None,
    block: Block = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Check a diffusion checkpoint: files, tensors, mask token, attention, decoding."""
    output_file(report, (".html",), "--report")
    reporter = make_reporter(quiet=quiet or as_json)
    from dllm_convert.pipeline.api.judging import verify as verified

    with typed():
        found = verified(
            checkpoint,
            against=against,
            files=files,
            page=report,
            revision=revision,
            block=block,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            reporter=reporter,
        )
    show_done(found, as_json=as_json)
    exit_if_failed(found.as_dict())
