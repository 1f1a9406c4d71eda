"""`serve`: answer OpenAI's clients with a converted checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dllm_convert.cli import options as option
from dllm_convert.cli.commands import decoding
from dllm_convert.cli.commands.shared import make_reporter
from dllm_convert.cli.types import named, port_of, seed_of

Host = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.")
]
Port = Annotated[
    int, typer.Option("--port", parser=port_of, metavar="N", help="Port; 0 takes a free one.")
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        parser=named,
        metavar="NAME",
        help="What requests call the model; by default its own name.",
    ),
]
Cors = Annotated[bool, typer.Option("--cors", help="Answer pages of other origins too.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", parser=seed_of, metavar="N", help="Seed of requests that have none."),
]


@decoding.with_settings
def serve(
    checkpoint: option.Published,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    settings: Any = None,
    seed: Seed = None,
    lossless: decoding.Lossless = False,
    base: decoding.VerifyingBase = None,
    revision: option.Revision = None,
    cors: Cors = False,
    quiet: option.Quiet = False,
) -> None:
    """Answer OpenAI's clients over HTTP with a converted checkpoint, until Ctrl-C.

    Settings hold where a request says nothing. For engines with a server of their own there is
    `export`.
    """
    reporter = make_reporter(quiet=quiet)
    decoding.check_here(checkpoint, settings, lossless=lossless, base=base)
    from dllm_convert.common.allocator import keep_freed_memory
    from dllm_convert.pipeline.api.endpoint import serve as answered

    keep_freed_memory()
    with decoding.typed():
        answered(
            checkpoint,
            host=host,
            port=port,
            name=name,
            revision=revision,
            lossless=lossless,
            base=base,
            seed=seed,
            cors=cors,
            reporter=reporter,
            **settings,
        )
