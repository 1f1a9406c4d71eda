"""`check`: what a run would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from dllm_convert.cli import options as option
from dllm_convert.cli import output
from dllm_convert.cli.commands.shared import asked_launch, asked_recipe
from dllm_convert.cli.values import parse_assignments, push_options, refuse_in_source
from dllm_convert.recipe.typed import default_out

if TYPE_CHECKING:
    from pathlib import Path

    from dllm_convert.common.terms import Target
    from dllm_convert.pipeline.asked import LaunchRequest
    from dllm_convert.planning.launch import Launch
    from dllm_convert.publishing import PushOptions
    from dllm_convert.recipe.schema import Recipe


def check(
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
    report_to: option.ReportTo = None,
    assignments: option.Assignments = None,
    num_processes: option.Processes = None,
    num_machines: option.Machines = None,
    launch_config: option.LaunchConfig = None,
    probe: option.Probe = False,
    allow_generic: option.AllowGeneric = False,
    allow_epochs: option.AllowEpochs = False,
    push_to_hub: option.PushToHub = None,
    public: option.Public = None,
    revision: option.PushRevision = None,
    create_pr: option.CreatePr = False,
    as_json: option.Json = False,
) -> None:
    """Show what run would do, loading no weights; run --dry-run takes every option of run."""
    launched: LaunchRequest = {
        "processes": num_processes,
        "num_machines": num_machines,
        "launch_config": launch_config,
        "global_batch": global_batch,
    }
    launch = asked_launch(**launched)
    push = push_options(push_to_hub, public=public, revision=revision, create_pr=create_pr)
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
    show_plan(recipe, folder, push, launch, probe=probe, as_json=as_json)


def show_plan(
    recipe: Recipe,
    folder: Path,
    push: PushOptions | None,
    launch: Launch,
    *,
    probe: bool,
    as_json: bool,
) -> None:
    """Say what a run would do."""
    from dllm_convert.pipeline.check import check

    output.show(check(recipe, folder, push, launch, probe=probe), as_json=as_json)
