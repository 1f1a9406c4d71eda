"""The command line: parse, call, print, exit code. Heavy modules are imported inside commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from dllm_convert.cli import options as option
from dllm_convert.cli.commands.chat import chat
from dllm_convert.cli.commands.check import check
from dllm_convert.cli.commands.env import env
from dllm_convert.cli.commands.evaluate import evaluate
from dllm_convert.cli.commands.lists import architectures, recipes
from dllm_convert.cli.commands.lm_eval import PASS_ON, lm_eval
from dllm_convert.cli.commands.push import card, export, push
from dllm_convert.cli.commands.run import run
from dllm_convert.cli.commands.sample import sample
from dllm_convert.cli.commands.serve import serve
from dllm_convert.cli.commands.verify import verify
from dllm_convert.cli.errors import CommandGroup
from dllm_convert.cli.guide import GUIDES
from dllm_convert.cli.streams import prepare

EXIT_CODES = {
    0: "done",
    1: "known failure: data, disk, memory, network or the Hub",
    2: "wrong usage: what can be seen from the command line alone",
    3: "incompatible: the recipe or the checkpoint cannot be converted as asked",
    4: "verification failed",
    130: "interrupted; the same run command goes on where it stopped",
}

app = typer.Typer(
    name="dllm-convert",
    cls=CommandGroup,
    help="Turn pretrained Transformer checkpoints into diffusion language models.",
    epilog="Exit codes: " + "; ".join(f"{code} {text}" for code, text in EXIT_CODES.items()) + ".",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """Run the command line."""
    prepare()
    app()


@app.callback()
def _root(version: option.Version = False) -> None:
    pass


def _offer(name: str, command: Callable[..., None], **how: Any) -> None:
    """Offer a command, with its group, its examples and where more is said."""
    guide = GUIDES[name]
    app.command(name, rich_help_panel=guide.group, epilog=guide.epilog, **how)(command)


_offer("run", run, help="Convert, train, verify and document a checkpoint.")
for _command in (check, verify, evaluate, sample, chat, serve, card, export, push):
    _offer(_command.__name__, _command)
for _command in (recipes, architectures, env):
    _offer(_command.__name__, _command)
_offer("lm-eval", lm_eval, context_settings=PASS_ON)
