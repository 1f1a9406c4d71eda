"""`evaluate`: likelihood and generation of a conversion, beside its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dllm_convert.cli import completion
from dllm_convert.cli import options as option
from dllm_convert.cli.commands import decoding
from dllm_convert.cli.commands.shared import make_reporter, show_done, typed
from dllm_convert.cli.types import count, count_from_zero, named, path_of
from dllm_convert.cli.values import parse_assignments
from dllm_convert.common.counts import LARGEST_COUNT

Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        parser=named,
        metavar="BASE",
        help="Evaluate this too, a folder or Hub id, on the same items.",
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        autocompletion=completion.tasks,
        help="Tasks of lm-eval, separated by commas.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--data",
        parser=named,
        metavar="SPEC",
        help="Measure NELBO, and the NLL of --against, on all of some files; of the text that it "
        "was trained on (pydoc, files, a Hub dataset), on what was held out.",
    ),
]
Include = Annotated[
    list[Path] | None,
    typer.Option(
        "--include-path", metavar="DIR", parser=path_of, help="Folder with more tasks. Repeatable."
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", parser=count, metavar="N", help="Most items per task.")
]
Shots = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot", parser=count_from_zero, metavar="N", help="Examples before each question."
    ),
]
Batch = Annotated[
    int,
    typer.Option("--batch-size", parser=count, metavar="N", help="Changes speed, and no score."),
]
Thresholds = Annotated[
    str | None,
    typer.Option(
        "--thresholds",
        metavar="P,P",
        help="Write with each of these confidence thresholds: accuracy against parallelism.",
    ),
]
BatchSizes = Annotated[
    str | None,
    typer.Option(
        "--batch-sizes",
        metavar="N,N",
        help="Sweep --thresholds with each of these prompts per forward: seconds, and no score.",
    ),
]
PublishedName = Annotated[
    str | None,
    typer.Option("--published", metavar="NAME", help="Settings that a paper reports with."),
]
Chat = Annotated[bool, typer.Option("--apply-chat-template", help="Ask through the chat template.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="draws, rounds, confidence, masking, seed, data.text_field (the column of --data), or "
        "a setting of decoding. Repeatable.",
    ),
]
Unsafe = Annotated[
    bool,
    typer.Option("--confirm-run-unsafe-code", help="Let tasks run the code that the model wrote."),
]
Record = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        parser=path_of,
        help="Folder for what is found; the checkpoint's own, OWNER--NAME-evaluation for a Hub id.",
    ),
]


def evaluate(
    checkpoint: option.Published,
    tasks: Tasks = "",
    against: Against = None,
    data: Text = None,
    include_path: Include = None,
    limit: Limit = None,
    num_fewshot: Shots = None,
    batch_size: Batch = 8,
    thresholds: Thresholds = None,
    batch_sizes: BatchSizes = None,
    published: PublishedName = None,
    apply_chat_template: Chat = False,
    lossless: decoding.Lossless = False,
    base: decoding.VerifyingBase = None,
    assignments: Assignments = None,
    confirm_run_unsafe_code: Unsafe = False,
    revision: option.Revision = None,
    out: Record = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Evaluate a converted checkpoint, and with --against its base on the same items."""
    reporter = make_reporter(quiet=quiet or as_json)
    from dllm_convert.pipeline.api.judging import evaluate as evaluated

    chosen = parse_assignments(assignments or ())
    decoding.check_base(chosen, lossless=lossless, base=base)
    names = _names(tasks)
    if names:
        from dllm_convert.common.allocator import keep_freed_memory

        keep_freed_memory()
    with typed():
        found = evaluated(
            checkpoint,
            tasks=names,
            data=data,
            against=against,
            limit=limit,
            shots=num_fewshot,
            batch_size=batch_size,
            thresholds=[_threshold(text) for text in _names(thresholds or "")],
            batch_sizes=[_batch(text) for text in _names(batch_sizes or "")],
            published=published,
            chat=apply_chat_template,
            lossless=lossless,
            base=base,
            include=include_path or (),
            settings=chosen,
            unsafe_code=confirm_run_unsafe_code,
            revision=revision,
            out=out,
            reporter=reporter,
        )
    show_done(found, as_json=as_json)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _batch(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= LARGEST_COUNT:
        raise typer.BadParameter(f"{text!r} is no number of prompts", param_hint="--batch-sizes")
    return int(text)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text!r} is no probability", param_hint="--thresholds")
    return value
