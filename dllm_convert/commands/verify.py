"""`verify`: probe a diffusion checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dllm_convert import cli_options as option
from dllm_convert import cli_output as output
from dllm_convert.cli_values import base_folder
from dllm_convert.commands.shared import exit_if_failed, make_reporter

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Folder or Hub id of a diffusion checkpoint, ours or of a known layout.",
        show_default=False,
    ),
]
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="SOURCE", help="The base to compare the weights with."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")
]
Block = Annotated[
    int | None,
    typer.Option(
        "--block",
        metavar="N",
        min=1,
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
    revision: Revision = None,
    block: Block = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Check a diffusion checkpoint: files, tensors, mask token, attention, decoding."""
    reporter = make_reporter(quiet=quiet or as_json)
    from dllm_convert.quiet import quiet_libraries
    from dllm_convert.verify import verify_checkpoint

    with quiet_libraries():
        base = base_folder(against, reporter) if against else None
        report = verify_checkpoint(
            checkpoint,
            revision=revision,
            against=base,
            trust_remote_code=trust_remote_code,
            block_size=block,
            reporter=reporter,
        ).as_dict()
    output.show(report, output.verification_table, as_json=as_json)
    exit_if_failed(report)
