"""`run`: convert a checkpoint, or say what would happen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from dllm_convert.cli import options as option
from dllm_convert.cli.commands.check import show_plan
from dllm_convert.cli.commands.shared import (
    asked_launch,
    asked_recipe,
    exit_if_failed,
    make_reporter,
    show_done,
    typed,
)
from dllm_convert.cli.types import offering, one_of
from dllm_convert.cli.values import parse_assignments, push_options, refuse_in_source
from dllm_convert.common.ranks import Rank
from dllm_convert.pipeline.options import Depth, RunOptions
from dllm_convert.recipe.typed import default_out

Link = Annotated[
    bool,
    typer.Option(
        "--link",
        help="Hard-link weight files that do not change, instead of copying them. Whatever "
        "overwrites one in place then changes both.",
    ),
]
Verify = Annotated[
    str,
    typer.Option(
        "--verify",
        parser=one_of(Depth),
        autocompletion=offering(Depth),
        metavar="auto|full|files",
        help="full runs the model, files reads files only; auto is full after training and for "
        "models up to 1 GiB in float32.",
    ),
]

Extend = Annotated[
    bool,
    typer.Option(
        "--extend",
        help="Train the finished checkpoint in --out on, for the steps of this command; it is "
        "replaced when the new one is verified.",
    ),
]

if TYPE_CHECKING:
    from dllm_convert.common.terms import Target
    from dllm_convert.pipeline.asked import LaunchRequest
    from dllm_convert.publishing import PushOptions
    from dllm_convert.recipe.schema import Recipe


def run(
    source: option.Source,
    to: option.To = None,
    block: option.Block = None,
    out: option.Out = None,
    data: option.Data = None,
    steps: option.Steps = None,
    tokens: option.Tokens = None,
    max_time: option.MaxTime = None,
    global_batch: option.GlobalBatch = None,
    preset: option.Preset = None,
    serve: option.Serve = None,
    lora: option.LoraRank = None,
    full: option.Full = False,
    no_train: option.NoTrain = False,
    keep_adapter: option.KeepAdapter = False,
    keep_base: option.KeepBase = False,
    source_revision: option.SourceRevision = None,
    allow_pickle: option.AllowPickle = False,
    link: Link = False,
    verify: Verify = "auto",
    extend: Extend = False,
    report_to: option.ReportTo = None,
    assignments: option.Assignments = None,
    num_processes: option.Processes = None,
    num_machines: option.Machines = None,
    launch_config: option.LaunchConfig = None,
    machine_rank: option.MachineRank = None,
    main_address: option.MainAddress = None,
    dry_run: option.DryRun = False,
    probe: option.Probe = False,
    allow_generic: option.AllowGeneric = False,
    allow_epochs: option.AllowEpochs = False,
    push_to_hub: option.PushToHub = None,
    public: option.Public = None,
    revision: option.PushRevision = None,
    create_pr: option.CreatePr = False,
    message: option.CommitMessage = None,
    as_json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
) -> None:
    """Convert a checkpoint; with `--dry-run`, only say how."""
    from dllm_convert.pipeline.launch import Machine
    from dllm_convert.pipeline.launch import launch as start

    place = Rank.from_environment()
    launched: LaunchRequest = {
        "processes": num_processes,
        "num_machines": num_machines,
        "launch_config": launch_config,
        "global_batch": global_batch,
    }
    launch = asked_launch(**launched)
    push = push_options(
        push_to_hub, public=public, revision=revision, create_pr=create_pr, commit_message=message
    )
    recipe = asked_recipe(
        source,
        to=cast("Target | None", to),
        block=block,
        data=data,
        steps=steps,
        tokens=tokens,
        max_time=max_time,
        preset=preset,
        serve=serve,
        lora=lora,
        full=full,
        train=not no_train,
        keep_adapter=keep_adapter,
        keep_base=keep_base,
        revision=source_revision,
        allow_pickle=allow_pickle,
        allow_generic=allow_generic,
        allow_epochs=allow_epochs,
        report_to=report_to,
        overrides=parse_assignments(assignments or ()),
        **launched,
    )
    folder = out or default_out(recipe)
    refuse_in_source(folder, recipe.source)
    if dry_run:
        show_plan(recipe, folder, push, launch, probe=probe, as_json=as_json)
        return
    if probe:
        raise typer.BadParameter("--probe is for check and --dry-run, --allow-generic for run")
    if extend and recipe.training.method == "none":
        raise typer.BadParameter("--extend trains on; leave out --no-train")
    if not place.launched:
        with typed():
            machine = Machine.asked(launch, machine_rank, main_address)
        if launch.strategy != "none":
            raise typer.Exit(start(launch, sys.argv[1:], machine=machine))
    how = RunOptions(link=link, verify=Depth(verify), extend=extend)
    _convert(recipe, folder, push, place, how, quiet=quiet, as_json=as_json, verbose=verbose)


def _convert(
    recipe: Recipe,
    folder: Path,
    push: PushOptions | None,
    place: Rank,
    how: RunOptions,
    *,
    quiet: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Do the run, or as another than the first process take part in its training."""
    reporter = make_reporter(quiet=quiet or as_json)
    if recipe.training.method != "none":
        from dllm_convert.common.allocator import keep_freed_memory

        keep_freed_memory()
    if not place.main:
        from dllm_convert.pipeline.run import follow

        follow(folder, place)
        return
    from dllm_convert.pipeline.api.conversion import convert_recipe

    done = convert_recipe(recipe, folder, reporter, push=push, place=place, how=how)
    show_done(done, as_json=as_json, verbose=verbose)
    exit_if_failed(done.manifest["verification"])
