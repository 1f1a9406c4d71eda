"""What several commands do before and after their work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Unpack

import typer

from dllm_convert.cli import output
from dllm_convert.cli.errors import flag, tell_line
from dllm_convert.errors import OutputError, RequestError, VerificationError, spelt

if TYPE_CHECKING:
    from dllm_convert.common.console import Reporter
    from dllm_convert.common.tables import Printed
    from dllm_convert.pipeline.asked import ConversionRequest, LaunchRequest
    from dllm_convert.planning.launch import Launch
    from dllm_convert.recipe.schema import Recipe


def make_reporter(*, quiet: bool) -> Reporter:
    """Return where progress goes; bars of the Hub client only on terminals."""
    from dllm_convert.common.console import Reporter

    reporter = Reporter(quiet=quiet)
    if not reporter.live:
        # Read once, when huggingface_hub is imported; bars belong on terminals only.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return reporter


def draws(reporter: Reporter) -> bool:
    """Whether somebody sits at a terminal that can be drawn on, and reads the result there too."""
    at_terminal = sys.stdout is not None and sys.stdout.isatty()
    return at_terminal and reporter.live and not reporter.console.is_dumb_terminal


@contextmanager
def typed() -> Iterator[None]:
    """Have a wrong request told as what it is here: a wrong command line, with its usage.

    Raises:
        typer.BadParameter: What was asked contradicts itself, or is no such value.
    """
    try:
        yield
    except RequestError as error:
        argument = None if error.argument is None else flag(error.argument)
        raise typer.BadParameter(spelt(str(error), flag), param_hint=argument) from error


def asked_recipe(source: str, **asked: Unpack[ConversionRequest]) -> Recipe:
    """Return the recipe that the options of `run` and `check` ask for.

    Args:
        source: Recipe, Hub id, folder or file.
        **asked: The options, as `dllm_convert.plan` takes them.

    Raises:
        typer.BadParameter: Options contradict each other, or would change nothing.
    """
    from dllm_convert.pipeline.api.conversion import load_recipe

    with typed():
        return load_recipe(source, **asked)


def asked_launch(**asked: Unpack[LaunchRequest]) -> Launch:
    """Return who is to train together, as the options say.

    Args:
        **asked: The options that say so.

    Raises:
        typer.BadParameter: They contradict each other.
    """
    from dllm_convert.pipeline.asked import launch_of

    with typed():
        return launch_of(asked)


def show_done(result: Printed, *, as_json: bool, verbose: bool = False) -> None:
    """Show the result of a command whose work lies elsewhere: in a folder, or in its exit code.

    Where stdout cannot be written the work is done all the same: that is told, and the exit code
    stays the work's own. A command whose work is what it prints ends with 1 instead.
    """
    try:
        output.show(result, as_json=as_json, verbose=verbose)
    except OutputError as error:
        tell_line("warning", str(error))


def exit_if_failed(verification: Mapping[str, Any]) -> None:
    """Leave with the exit code of a failed verification.

    Raises:
        typer.Exit: A probe failed.
    """
    if not verification["passed"]:
        from dllm_convert.verification.shown import failed_probes

        failed = failed_probes(verification)
        tell_line("error", f"verification failed: {failed}")
        raise typer.Exit(VerificationError.exit_code)
