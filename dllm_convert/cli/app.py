"""The command line: parse, call, print, exit code. Heavy modules are imported inside commands."""

from __future__ import annotations

import typer

from dllm_convert.cli import options as option
from dllm_convert.cli.commands.chat import chat
from dllm_convert.cli.commands.check import check
from dllm_convert.cli.commands.evaluate import evaluate
from dllm_convert.cli.commands.lists import architectures, recipes
from dllm_convert.cli.commands.lm_eval import PASS_ON, lm_eval
from dllm_convert.cli.commands.push import card, export, push
from dllm_convert.cli.commands.run import run
from dllm_convert.cli.commands.sample import sample
from dllm_convert.cli.commands.serve import serve
from dllm_convert.cli.commands.verify import verify
from dllm_convert.cli.errors import CommandGroup
from dllm_convert.cli.streams import prepare

EXIT_CODES = {
    0: "done",
    1: "known failure: data, disk, memory, network or the Hub",
    2: "wrong usage of the command line",
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
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """Run the command line."""
    prepare()
    app()


@app.callback()
def _root(version: option.Version = False) -> None:
    pass


app.command(help="Convert, train, verify and document a checkpoint.")(run)
for _command in (check, verify, evaluate, sample, chat, card, export, push, recipes, architectures):
    app.command()(_command)
app.command()(serve)
app.command("lm-eval", context_settings=PASS_ON)(lm_eval)
