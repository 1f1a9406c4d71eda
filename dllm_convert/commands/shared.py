"""What several commands do before and after their work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from dllm_convert import cli_output as output
from dllm_convert.cli_errors import tell
from dllm_convert.errors import VerificationError
from dllm_convert.shown_text import printable

if TYPE_CHECKING:
    from dllm_convert.console import Reporter


def make_reporter(*, quiet: bool) -> Reporter:
    """Return where progress goes; bars of the Hub client only on terminals."""
    from dllm_convert.console import Reporter

    reporter = Reporter(quiet=quiet)
    if not reporter.live:
        # Read once, when huggingface_hub is imported; bars belong on terminals only.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return reporter


def exit_if_failed(verification: Mapping[str, Any]) -> None:
    """Leave with the exit code of a failed verification.

    Raises:
        typer.Exit: A probe failed.
    """
    if not verification["passed"]:
        failed = output.failed_probes(verification)
        tell(printable(f"error: verification failed: {failed}\n"))
        raise typer.Exit(VerificationError.exit_code)
