"""`sample`: write text with a converted checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from dllm_convert import cli_options as option
from dllm_convert import cli_output as output
from dllm_convert.commands.shared import make_reporter

Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Text to go on from.")]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens to write.")
]
DenoisingSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, metavar="N", help="Forwards per block (bd3lm) or per text (mdlm)."
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
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, metavar="N", help="Seed for temperatures above 0.")
]


def sample(
    checkpoint: option.Checkpoint,
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = None,
    steps: DenoisingSteps = None,
    threshold: Threshold = None,
    temperature: Temperature = None,
    seed: Seed = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Write text with a converted checkpoint; options left out take the checkpoint's defaults."""
    reporter = make_reporter(quiet=quiet or as_json)
    from dllm_convert.quiet import quiet_libraries
    from dllm_convert.sampling.run import run_sample

    with reporter.task("load and decode"), quiet_libraries():
        result = run_sample(
            checkpoint,
            prompt,
            seed=seed,
            max_new_tokens=max_new_tokens,
            max_denoising_steps=steps,
            confidence_threshold=threshold,
            temperature=temperature,
        )
    if as_json:
        output.write_json(result)
    else:
        output.write(result["prompt"] + result["text"])
        reporter.line(output.sample_facts(result))
