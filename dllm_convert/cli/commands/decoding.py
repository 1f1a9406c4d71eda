"""How `sample` decodes: the options, and what is said where they contradict each other."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dllm_convert.cli.types import count

_PANEL = "Decoding"


class Unmasking(StrEnum):
    """What positions are ranked by: the package's own names, without importing torch."""

    CONFIDENCE = "confidence"
    MARGIN = "margin"
    ENTROPY = "entropy"
    RANDOM = "random"


class Remasking(StrEnum):
    """Which tokens are taken back."""

    LOW_CONFIDENCE = "low_confidence"
    RANDOM = "random"


MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", parser=count, metavar="N", help="Tokens to write.")
]
DenoisingSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", parser=count, metavar="N", help="Forwards per block (bd3lm) or per text (mdlm)."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold", min=0, max=1, metavar="P", help="Commit every token at least this sure."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0, metavar="T", help="0 takes the likeliest token."),
]
EntropyBound = Annotated[
    float | None,
    typer.Option(
        "--entropy-bound",
        min=0,
        metavar="NATS",
        rich_help_panel=_PANEL,
        help="Commit the surest tokens whose entropies, the largest left out, sum to at most this.",
    ),
]
UnmaskingOrder = Annotated[
    Unmasking | None,
    typer.Option(
        "--unmasking",
        metavar="|".join(Unmasking),
        rich_help_panel=_PANEL,
        help="What positions are ranked by.",
    ),
]
RemaskingKind = Annotated[
    Remasking | None,
    typer.Option(
        "--remasking",
        metavar="|".join(Remasking),
        rich_help_panel=_PANEL,
        help="Take tokens of earlier steps back.",
    ),
]
RemaskingRatio = Annotated[
    float | None,
    typer.Option(
        "--remasking-ratio",
        min=0,
        metavar="R",
        rich_help_panel=_PANEL,
        help="Share of them per step, below 1; 0.1 by default.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        parser=count,
        metavar="K",
        rich_help_panel=_PANEL,
        help="Draw from the K likeliest tokens.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0,
        max=1,
        metavar="P",
        rich_help_panel=_PANEL,
        help="Draw from the fewest tokens that hold this probability.",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        min=0,
        max=1,
        metavar="P",
        rich_help_panel=_PANEL,
        help="Draw from tokens at least this likely, relative to the likeliest.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale",
        min=0,
        metavar="W",
        rich_help_panel=_PANEL,
        help="Classifier-free guidance with the prompt masked; 1 is none.",
    ),
]
BlockLength = Annotated[
    int | None,
    typer.Option(
        "--block-length",
        parser=count,
        metavar="N",
        rich_help_panel=_PANEL,
        help="mdlm only: write N tokens at a time from left to right.",
    ),
]
ApproximateCache = Annotated[
    bool,
    typer.Option(
        "--approximate-cache",
        rich_help_panel=_PANEL,
        help="mdlm with --block-length only: keep the states outside the block. Not exact.",
    ),
]
Infill = Annotated[
    str | None,
    typer.Option(
        "--infill",
        metavar="MARK",
        rich_help_panel=_PANEL,
        help="Text that stands for a token to be written wherever it is in a prompt, as in ___.",
    ),
]

FLAGS = {
    "max_new_tokens": "--max-new-tokens",
    "max_denoising_steps": "--steps",
    "confidence_threshold": "--threshold",
    "temperature": "--temperature",
    "entropy_bound": "--entropy-bound",
    "unmasking": "--unmasking",
    "remasking": "--remasking",
    "remasking_ratio": "--remasking-ratio",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "guidance_scale": "--guidance-scale",
    "block_length": "--block-length",
    "approximate_cache": "--approximate-cache",
}
"""Options by the name that decoding has for them."""


def given_settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Return the settings of decoding that were given, once they fit together.

    Args:
        folder: The checkpoint, of which no weights are read.
        **options: By the names of decoding; None, or False for a flag, where nothing was given.

    Raises:
        typer.BadParameter: They contradict each other or the checkpoint.
    """
    given = {
        name: str(value) if isinstance(value, StrEnum) else value
        for name, value in options.items()
        if value is not None and value is not False
    }
    from dllm_convert.sampling.checking import check_decoding

    try:
        check_decoding(folder, given)
    except ValueError as error:
        names = re.compile(rf"\b({'|'.join(FLAGS)})\b")
        raise typer.BadParameter(names.sub(lambda found: FLAGS[found[1]], str(error))) from error
    return given
