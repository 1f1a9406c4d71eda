"""`lm-eval`: lm-eval's own command line, to which `--model dllm-convert` is known."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ARGUMENTS]", help="Arguments of lm-eval; --help shows them."),
]
PASS_ON = {
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}
"""How click leaves every argument alone."""


def lm_eval(arguments: Arguments = None) -> None:
    """Run lm-eval, which then knows `--model dllm-convert`; all arguments are its own.

    lm-eval finds models in a table of its own and reads no entry points, so the plain `lm_eval`
    command cannot know this one.
    """
    from dllm_convert.evaluation.outcome import require_harness

    require_harness()
    from lm_eval.__main__ import cli_evaluate

    import dllm_convert.evaluation.harness  # noqa: F401 - registers the model
    from dllm_convert.evaluation.names import own_tasks

    sys.argv = ["lm-eval", *(arguments or ())]
    with own_tasks():
        cli_evaluate()
