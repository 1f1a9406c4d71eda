"""The command line: parse, call, print, exit code. Heavy modules are imported inside commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dllm_convert import cli_options as option
from dllm_convert import cli_output as output
from dllm_convert.cli_errors import CommandGroup
from dllm_convert.cli_values import (
    base_folder,
    default_out,
    method,
    parse_assignments,
    plan_document,
    push_options,
)
from dllm_convert.errors import VerificationError
from dllm_convert.place import Place

if TYPE_CHECKING:
    from dllm_convert.console import Reporter
    from dllm_convert.publish import PushOptions
    from dllm_convert.schema import Recipe

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
    app()


@app.callback()
def _root(version: option.Version = False) -> None:
    pass


# Decorators apply from below: `run` stands before `check` in the help.
@app.command("check", help="Show what run would do with the same arguments; loads no weights.")
@app.command("run", help="Convert, train, verify and document a checkpoint.")
def run(
    ctx: typer.Context,
    source: option.Source,
    to: option.To = None,
    block: option.Block = None,
    out: option.Out = None,
    data: option.Data = None,
    steps: option.Steps = None,
    lora: option.LoraRank = None,
    full: option.Full = False,
    no_train: option.NoTrain = False,
    keep_adapter: option.KeepAdapter = False,
    source_revision: option.SourceRevision = None,
    report_to: option.ReportTo = None,
    assignments: option.Assignments = None,
    num_processes: option.Processes = None,
    launch_config: option.LaunchConfig = None,
    dry_run: option.DryRun = False,
    push_to_hub: option.PushToHub = None,
    public: option.Public = None,
    revision: option.PushRevision = None,
    create_pr: option.CreatePr = False,
    commit_message: option.CommitMessage = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Convert a checkpoint; as `check` or with `--dry-run`, only say how."""
    from dllm_convert.recipe import load_recipe

    flags = {
        "target": to,
        "block_size": block,
        "data.source": data,
        "training.steps": steps,
        "training.method": method(lora, full=full, no_train=no_train),
        "training.lora.rank": lora,
        "training.keep_adapter": keep_adapter or None,
        "training.report_to": report_to,
        "revision": source_revision,
    }
    given = {field: value for field, value in flags.items() if value is not None}
    push = push_options(
        push_to_hub,
        public=public,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    recipe = load_recipe(source, overrides=given | parse_assignments(assignments or ()))
    folder, place = out or default_out(recipe), Place.from_environment()
    if dry_run or ctx.info_name == "check":
        document = plan_document(recipe, folder, push, num_processes or place.world)
        output.show(document, output.plan_text, as_json=as_json)
        return
    if (num_processes or launch_config) and not place.launched:
        raise typer.Exit(_launch(num_processes, launch_config))
    _convert(recipe, folder, push, place, quiet=quiet, as_json=as_json)


@app.command()
def verify(
    checkpoint: option.Checkpoint,
    against: option.Against = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Check a converted checkpoint: files, tensors, mask token, attention, decoding."""
    reporter = _reporter(quiet=quiet or as_json)
    from dllm_convert.quiet import quiet_libraries
    from dllm_convert.verify import verify_checkpoint

    with quiet_libraries():
        base = base_folder(against, reporter) if against else None
        report = verify_checkpoint(checkpoint, against=base, reporter=reporter).as_dict()
    output.show(report, output.verification_table, as_json=as_json)
    _exit_if_failed(report)


@app.command()
def sample(
    checkpoint: option.Checkpoint,
    prompt: option.Prompt = None,
    max_new_tokens: option.MaxNewTokens = None,
    steps: option.DenoisingSteps = None,
    threshold: option.Threshold = None,
    temperature: option.Temperature = None,
    seed: option.Seed = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Write text with a converted checkpoint; options left out take the checkpoint's defaults."""
    reporter = _reporter(quiet=quiet or as_json)
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


@app.command()
def card(checkpoint: option.Checkpoint, as_json: option.Json = False) -> None:
    """Write the model card (README.md) of a converted checkpoint anew."""
    from dllm_convert.card import write_card

    output.show({"path": str(write_card(checkpoint))}, itemgetter("path"), as_json=as_json)


@app.command()
def push(
    checkpoint: option.Checkpoint,
    repo_id: option.RepoId,
    public: option.Public = None,
    revision: option.PushRevision = None,
    create_pr: option.CreatePr = False,
    commit_message: option.CommitMessage = None,
    max_shard_size: option.MaxShardSize = None,
    overwrite_card: option.OverwriteCard = False,
    adapter_only: option.AdapterOnly = False,
    force_unverified: option.ForceUnverified = False,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Publish a converted checkpoint on the Hub, and check what arrived there."""
    reporter = _reporter(quiet=quiet or as_json)
    options = push_options(
        repo_id,
        public=public,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        max_shard_size=max_shard_size,
        overwrite_card=overwrite_card,
        adapter_only=adapter_only,
        force_unverified=force_unverified,
    )
    from dllm_convert.publish import push_checkpoint

    result = push_checkpoint(checkpoint, options, reporter)
    output.show(result.as_dict(), output.push_summary, as_json=as_json)


@app.command()
def recipes(name: option.RecipeName = None, as_json: option.Json = False) -> None:
    """List the recipes, or show one with every field it resolves to."""
    from dllm_convert.recipe import dump_recipe, list_recipes, load_recipe

    if name is not None:
        recipe = load_recipe(name, overrides={})
        if as_json:
            output.write_json(recipe.model_dump(mode="json"))
        else:
            output.write(dump_recipe(recipe))
        return
    entries = list_recipes()
    if as_json:
        output.write_json([asdict(entry) for entry in entries])
        return
    rows = [(e.name, e.source, e.license, e.target, e.block_size) for e in entries]
    output.write(output.table(("recipe", "source", "licence", "target", "block"), rows))


@app.command()
def architectures(as_json: option.Json = False) -> None:
    """List the model families that can be converted."""
    from dllm_convert.adapters import all_adapters

    families = all_adapters()
    if as_json:
        output.write_json([asdict(family) for family in families])
        return
    header = ("model_type", "class", "targets", "attention of the base", "transformers")
    rows = [
        (
            family.model_type,
            family.stock_class,
            " ".join(family.targets),
            family.attention,
            f">={family.min_transformers}",
        )
        for family in families
    ]
    output.write(output.table(header, rows))


def _convert(
    recipe: Recipe,
    folder: Path,
    push: PushOptions | None,
    place: Place,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Do the run, or as another than the first process take part in its training."""
    reporter = _reporter(quiet=quiet or as_json)
    from dllm_convert import pipeline

    if not place.main:
        pipeline.follow(recipe, folder, place)
        return
    result = pipeline.run(recipe, folder, reporter, push=push, place=place)
    published = result.pushed.as_dict() if result.pushed else None
    document = output.run_document(str(result.path), result.passed, result.manifest, published)
    output.show(document, output.run_text, as_json=as_json)
    _exit_if_failed(result.manifest["verification"])


def _launch(processes: int | None, config: Path | None) -> int:
    from dllm_convert.launch import launch

    return launch(processes, config, sys.argv[1:])


def _reporter(*, quiet: bool) -> Reporter:
    from dllm_convert.console import Reporter

    reporter = Reporter(quiet=quiet)
    if not reporter.live:
        # Read once, when huggingface_hub is imported; bars belong on terminals only.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return reporter


def _exit_if_failed(verification: Mapping[str, Any]) -> None:
    if not verification["passed"]:
        typer.echo(f"error: verification failed: {output.failed_probes(verification)}", err=True)
        raise typer.Exit(VerificationError.exit_code)
