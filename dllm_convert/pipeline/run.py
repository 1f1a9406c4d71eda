"""The whole conversion: source → plan → adapt → train → verify → card, resumable at every step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import read_manifest
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.common.ranks import Place
from dllm_convert.errors import DllmConvertError
from dllm_convert.pipeline.family import measured_adapter, record_adapter
from dllm_convert.pipeline.options import DEFAULT, How
from dllm_convert.pipeline.stages import Stages
from dllm_convert.pipeline.workspace import (
    Workspace,
    check_apart,
    fingerprint,
    open_workspace,
    read_workspace,
)
from dllm_convert.planning.conversion import ConversionPlan, make_plan, source_facts
from dllm_convert.recipe.loading import same_name_warning
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.reporting import require_installed

if TYPE_CHECKING:
    from dllm_convert.publishing import PushOptions, PushResult

ALONE = Place()


@dataclass(frozen=True)
class RunResult:
    """A finished conversion.

    Attributes:
        path: Folder of the checkpoint.
        manifest: Content of its dllm_convert.json.
        passed: Whether every probe of the verification passed.
        pushed: What was published, None if nothing was asked for or verification failed.
    """

    path: Path
    manifest: Mapping[str, Any]
    passed: bool
    pushed: PushResult | None = None


def plan_conversion(recipe: Recipe, out: Path | None = None) -> ConversionPlan:
    """Read the source's headers and plan; loads no weights and imports no torch.

    A family without an adapter is measured in another process, if the recipe allows it.

    Args:
        recipe: The resolved recipe.
        out: Output folder of the run, whose measured adapter is taken if it has one.

    Raises:
        DllmConvertError: If the source cannot be read or the conversion cannot work.
    """
    warning = same_name_warning(recipe)
    try:
        source = inspect_source(recipe.source, revision=recipe.revision)
        plan = make_plan(recipe, source, measured_adapter(recipe, source, out))
    except DllmConvertError as error:
        if warning:
            error.hint = f"{error.hint}; {warning}" if error.hint else warning.capitalize()
        raise
    return replace(plan, warnings=(warning, *plan.warnings)) if warning else plan


def follow(recipe: Recipe, out: Path, place: Place) -> None:
    """Take part in the training of a run that the first process does; any other process's work.

    Args:
        recipe: The resolved recipe.
        out: Output folder, which all processes see.
        place: This process.
    """
    from dllm_convert.training.distributed import meet

    plan, reporter = plan_conversion(recipe, out), Reporter(quiet=True)
    with quiet_libraries():
        if meet(place):
            workspace = read_workspace(out)
            Stages(_of_this_run(plan, workspace), workspace, reporter, place).train()


def _of_this_run(plan: ConversionPlan, workspace: Workspace) -> ConversionPlan:
    """Return the plan; of a run that goes on with a finished checkpoint, with another seed."""
    if workspace.extends is None:
        return plan
    from dllm_convert.pipeline.extension import seeded_anew

    return replace(plan, recipe=seeded_anew(plan.recipe, workspace.extends))


def _begin_extension(plan: ConversionPlan, out: Path) -> Mapping[str, Any]:
    from dllm_convert.pipeline.extension import begin

    return begin(plan, out)


def run(
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    *,
    push: PushOptions | None = None,
    place: Place = ALONE,
    how: How = DEFAULT,
) -> RunResult:
    """Convert, train, verify and document a checkpoint.

    The same call on the same `out` goes on where an earlier one stopped.

    Args:
        recipe: The resolved recipe.
        out: Folder in which the checkpoint appears when it is whole.
        reporter: Progress.
        push: Where to publish a checkpoint that passed its verification.
        place: This process, the first of several that train; the others `follow`.
        how: Links and depth of verification, which an interrupted run may choose anew; and
            whether a finished checkpoint in `out` is trained on.

    Raises:
        DllmConvertError: If a stage fails; what is finished is kept for the next call.
    """
    require_installed(recipe.training.report_to)
    plan = plan_conversion(recipe, out)
    check_apart(out, plan.source.path)
    if push is not None:
        from dllm_convert.publishing.run import preflight

        # Hours of training are not to end in "not logged in".
        push = preflight({"source": source_facts(plan)}, push, reporter)
    asked = recipe.identity()
    run_id = fingerprint(asked | {"extend": True} if how.extend else asked, plan.source.fingerprint)
    extend = partial(_begin_extension, plan) if how.extend else None
    with open_workspace(out, run_id, asked, extend=extend) as workspace:
        plan = _of_this_run(plan, workspace)
        record_adapter(workspace.work, plan.adapter)
        for warning in plan.warnings:
            reporter.warn(warning)
        stages = Stages(plan, workspace, reporter, place, how)
        # Quietening libraries imports them, which takes longer than a light run.
        with nullcontext() if stages.light else quiet_libraries():
            stages.finish()
        manifest = read_manifest(out)
        result = RunResult(out, manifest, manifest["verification"]["passed"])
        if push is None or not result.passed:
            return result
        from dllm_convert.publishing.run import push_locked

        return replace(result, pushed=push_locked(out, push, reporter))
