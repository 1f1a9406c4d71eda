"""What commands print on stdout: one JSON document, or text for people."""

from __future__ import annotations

import sys
from typing import Any

from dllm_convert.cli.streams import lost, silence
from dllm_convert.common import strict_json
from dllm_convert.common.shown_text import json_safe, printable
from dllm_convert.common.tables import TONES, Block, Printed, Toned, text_of


def write_json(value: Any) -> None:
    """Write the one JSON document of a `--json` command."""
    document = strict_json.dumps(value, indent=2, ensure_ascii=False, default=str)
    write(json_safe(document), verbatim=True)


def write(text: str, *, verbatim: bool = False) -> None:
    """Write text and a line end to stdout.

    Args:
        text: What to show.
        verbatim: Write it as it is; otherwise nothing in it acts on a terminal.

    Raises:
        OutputError: As `write_piece`.
    """
    write_piece((text if verbatim else printable(text)).rstrip("\n") + "\n")


def write_piece(text: str) -> None:
    """Write a piece of text to stdout as it is, the one place that does.

    Where nobody reads it, closed or gone as with `| head`, nothing was asked for: what the command
    did is what counts.

    Raises:
        OutputError: It cannot be written for another reason, such as a full disk.
    """
    if sys.stdout is None:
        return
    try:
        # A plain write: rich would wrap at 80 columns where stdout is a pipe.
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        raise lost(error) from error


def show(result: Printed, *, as_json: bool, verbose: bool = False) -> None:
    """Write what a command found: as its one JSON document, or as text for people.

    Args:
        result: What was found.
        as_json: Whether a document is wanted.
        verbose: Whether people want all of it.
    """
    if as_json:
        write_json(result.as_dict())
        return
    blocks = result.as_details() if verbose else result.as_blocks()
    if sys.stdout is not None and sys.stdout.isatty():
        write("\n".join(map(_coloured, blocks)), verbatim=True)
    else:
        write(text_of(blocks))


def _coloured(block: Block) -> str:
    """Return a block for a terminal, in its tone if it has one and the terminal has colours."""
    text = printable(str(block))
    if not isinstance(block, Toned):
        return text
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, soft_wrap=True)
    with console.capture() as captured:
        console.print(Text(text, TONES[block.tone]), end="")
    return captured.get()
