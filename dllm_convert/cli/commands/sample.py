"""`sample`: write text with a converted checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllm_convert.cli import options as option
from dllm_convert.cli import output
from dllm_convert.cli.commands import decoding
from dllm_convert.cli.commands.shared import draws, make_reporter
from dllm_convert.cli.types import count, path_of, seed_of
from dllm_convert.cli.values import output_file
from dllm_convert.common.shown_text import printable
from dllm_convert.errors import DataError

if TYPE_CHECKING:
    from dllm_convert.common.console import Reporter

STDIN = "-"
FORMATS = (".gif", ".html")
"""What `watch.record` writes, refused here before anything is loaded."""


def _recordable(path: Path | None) -> Path | None:
    return output_file(path, FORMATS, "--record")


Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="Text to go on from; - reads it from stdin. Repeatable: all are written together.",
    ),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="Put each prompt into the chat template, and write the reply."),
]
Watch = Annotated[
    bool, typer.Option("--watch", help="Show the text on stderr while it is denoised.")
]
Record = Annotated[
    Path | None,
    typer.Option(
        "--record",
        metavar="FILE",
        parser=path_of,
        callback=_recordable,
        help="Write how the text was denoised to a .gif or .html file.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", parser=seed_of, metavar="N", help="Seed for temperatures above 0."),
]


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", parser=count, metavar="N", help="Threads of llama.cpp, of a GGUF file."
    ),
]


@decoding.with_settings
def sample(
    checkpoint: option.CheckpointOrGguf,
    prompt: Prompts = None,
    chat: Chat = False,
    settings: Any = None,
    seed: Seed = None,
    watch: Watch = False,
    record: Record = None,
    threads: Threads = None,
    infill: decoding.Infill = None,
    lossless: decoding.Lossless = False,
    base: decoding.VerifyingBase = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Write text with a converted checkpoint; options left out take the checkpoint's defaults."""
    given = prompt or []
    _check_together(given, watch=watch, record=record, silent=quiet or as_json)
    decoding.check_here(checkpoint, settings, lossless=lossless, base=base)
    reporter = make_reporter(quiet=quiet or as_json)
    how = {**settings, "chat": chat, "infill": infill, "seed": seed}
    how |= {"threads": threads, "lossless": lossless, "base": base}
    stream = draws(reporter) and not (watch or as_json)
    found = _write(checkpoint, given, reporter, watch=watch, stream=stream, record=record, **how)
    _print(found, reporter, chat=chat, as_json=as_json)


def _write(
    checkpoint: str,
    given: Sequence[str],
    reporter: Reporter,
    *,
    watch: bool,
    stream: bool,
    record: Path | None,
    **how: Any,
) -> list[dict[str, Any]]:
    """Read the prompts that stand on stdin, load the checkpoint and decode."""
    prompts = [_read_stdin(reporter) if text == STDIN else text for text in given]
    from dllm_convert.common.allocator import keep_freed_memory
    from dllm_convert.pipeline.api.writing import sample as written
    from dllm_convert.sampling import DEFAULT_PROMPT

    keep_freed_memory()
    with decoding.typed():
        samples = written(
            checkpoint,
            prompts or [DEFAULT_PROMPT],
            reporter=reporter,
            watch=watch,
            stream=stream,
            record=record,
            **how,
        )
    return [result.as_dict() for result in samples]


def _print(found: list[dict[str, Any]], reporter: Reporter, *, chat: bool, as_json: bool) -> None:
    from dllm_convert.sampling.shown import sample_facts

    if as_json:
        output.write_json(found if len(found) > 1 else found[0])
        return
    # Of a chat the replies only; a line of dashes stands between two texts.
    texts = [result["text"] if chat else result["prompt"] + result["text"] for result in found]
    joined = "\n---\n".join(texts)
    output.write(printable(joined) if sys.stdout.isatty() else joined, verbatim=True)
    for result in found:
        reporter.line(sample_facts(result))


def _check_together(
    prompts: Sequence[str], *, watch: bool, record: Path | None, silent: bool
) -> None:
    """Refuse options that contradict each other.

    Raises:
        typer.BadParameter: They do.
    """
    if watch and silent:
        raise typer.BadParameter("--watch shows what --quiet and --json keep silent.")
    if record and len(prompts) > 1:
        raise typer.BadParameter("--record shows one text; give one --prompt.")
    if prompts.count(STDIN) > 1:
        raise typer.BadParameter("stdin can be read once; give --prompt - once.")


def _read_stdin(reporter: Reporter) -> str:
    """Read a prompt, without the line end that a shell puts behind it.

    Raises:
        DataError: It is not UTF-8.
    """
    if sys.stdin.isatty():
        reporter.line("Type the prompt; Ctrl-D on an empty line ends it")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError("the prompt on stdin is not UTF-8", hint="Convert it first") from error
