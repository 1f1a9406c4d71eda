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
from dllm_convert.common.ranks import ALONE, Rank
from dllm_convert.errors import DllmConvertError, VerificationError
from dllm_convert.pipeline.context import Run
from dllm_convert.pipeline.family import measured_adapter, record_adapter
from dllm_convert.pipeline.measures import BASELINE, MEASURE, SAMPLE, VIEWS
from dllm_convert.pipeline.opening import opening_lines, training_line
from dllm_convert.pipeline.options import DEFAULT, RunOptions
from dllm_convert.pipeline.resumed import check_resumed
from dllm_convert.pipeline.stages import (
    ADAPT,
    APPEAR,
    ASSEMBLE,
    DOCUMENT,
    MATERIALISE,
    TRAIN,
    VERIFY,
    clean,
)
from dllm_convert.pipeline.text import plan_text
from dllm_convert.pipeline.workspace import (
    Workspace,
    check_apart,
    fingerprint,
    goes_on,
    open_workspace,
    read_workspace,
)
from dllm_convert.pipeline.writing import WRITE, prepare_writing
from dllm_convert.planning.conversion import ConversionPlan, make_plan, source_facts
from dllm_convert.planning.devices import Device, known_gpu, this_cpu
from dllm_convert.planning.launch import ALONE as ONE_PROCESS
from dllm_convert.planning.launch import Launch
from dllm_convert.recipe.loading import same_name_warning
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.reporting import require_installed

if TYPE_CHECKING:
    from dllm_convert.publishing import PushOptions, PushResult


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


def plan_conversion(
    recipe: Recipe, out: Path | None = None, launch: Launch = ONE_PROCESS
) -> ConversionPlan:
    """Read the source's headers and plan; loads no weights and imports no torch.

    A family without an adapter is measured in another process, if the recipe allows it.

    Args:
        recipe: The resolved recipe.
        out: Output folder of the run, whose measured adapter is taken if it has one.
        launch: Who trains together.

    Raises:
        DllmConvertError: If the source cannot be read or the conversion cannot work.
    """
    warning = same_name_warning(recipe)
    try:
        source = inspect_source(recipe.source, revision=recipe.revision)
        plan = make_plan(recipe, source, measured_adapter(recipe, source, out), launch)
    except DllmConvertError as error:
        if warning:
            error.hint = f"{error.hint}; {warning}" if error.hint else warning.capitalize()
        raise
    return replace(plan, warnings=(warning, *plan.warnings)) if warning else plan


def follow(out: Path, place: Rank) -> None:
    """Take part in the training of a run that the first process does; any other process's work.

    Args:
        out: Output folder, which all processes see.
        place: This process.
    """
    from dllm_convert.training.distributed import meet

    with quiet_libraries():
        while (errand := meet(place)) is not None:
            shared: Errand = errand
            run = Run(shared.plan, read_workspace(out), Reporter(quiet=True), place)
            {WRITE.name: WRITE, TRAIN.name: TRAIN}[shared.stage].work(run)
            if shared.stage == TRAIN.name:
                return


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
    place: Rank = ALONE,
    how: RunOptions = DEFAULT,
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
    plan = plan_conversion(recipe, out, Launch.current())
    check_apart(out, plan.source.path)
    if push is not None:
        from dllm_convert.publishing.run import preflight

        # Hours of training are not to end in "not logged in".
        push = preflight({"source": source_facts(plan)}, push, reporter)
    # Before anything is written: a wrong name is found out in a second. A run that goes on has its
    # text in its folder.
    asked = recipe.identity(place.world)
    run_id = fingerprint(asked | {"extend": True} if how.extend else asked, plan.source.fingerprint)
    text = None if goes_on(out, run_id, extend=how.extend) else plan_text(plan)
    extend = partial(_begin_extension, plan) if how.extend else None
    with open_workspace(out, run_id, asked, extend=extend) as workspace:
        plan = _of_this_run(plan, workspace)
        record_adapter(workspace.work, plan.adapter)
        for line in opening_lines(plan, out):
            reporter.line(line)
        if text is not None:
            for line in text.line().splitlines():
                reporter.line(line)
        for warning in plan.warnings:
            reporter.warn(warning)
        conversion = Run(plan, workspace, reporter, place, how)
        # Quietening libraries imports them, which takes longer than a light run.
        with nullcontext() if conversion.light else quiet_libraries():
            _finish(conversion)
        manifest = read_manifest(out)
        result = RunResult(out, manifest, manifest["verification"]["passed"])
        if push is None or not result.passed:
            return result
        from dllm_convert.publishing.run import push_locked

        return replace(result, pushed=push_locked(out, push, reporter))


def _finish(run: Run) -> None:
    """Do what is left of the seven stages; the checkpoint stands in the output folder afterwards.

    Each is recorded when it is done, and never done twice. What the staged checkpoint was put
    together from may be gone once it is whole.
    """
    if run.trains:
        from dllm_convert.training.setup import require_devices

        require_devices(run.plan.recipe.training)
        if run.found(TRAIN) is None:
            run.reporter.line(training_line(run.plan, _device()))
    check_resumed(run)
    assembled = run.found(ASSEMBLE) is not None
    if not assembled:
        # 1. The source, as safetensors on this disk.
        run.do(MATERIALISE)
        # 2. The untrained conversion: the mask's row, opened attention, config, tokenizer, code.
        run.do(ADAPT)
        # What is trained on, where the base writes it.
        if run.trains and run.plan.recipe.data.write_with_base.prompts:
            _write_together(run)
        # 3. What it and its base make of held-out text, and what to expect of the training.
        if run.trains:
            run.do(BASELINE)
    # 4. The training, together with the processes that wait for it.
    _train_together(run, needed=run.trains and not assembled)
    if not assembled:
        # 5. The same text again, what pictures show, a sample; then everything in one folder.
        if run.trains:
            run.do(MEASURE)
        if not run.light:
            run.do(VIEWS)
            run.do(SAMPLE)
        run.do(ASSEMBLE)
    # 6. Is it what it says it is?
    verified = run.do(VERIFY)
    if run.workspace.extends is not None and not verified.passed:
        raise VerificationError(
            f"what was trained on failed its verification ({verified.failed}) and does not replace "
            f"{run.workspace.out}",
            hint=f"It lies in {run.workspace.staged}; --extend with other options begins anew",
        )
    # 7. Card and report; then it appears, whole or not at all.
    run.do(DOCUMENT)
    run.do(APPEAR)
    clean(run)


def _device() -> Device | None:
    """Return what is known of the device that will train."""
    import torch

    if torch.cuda.is_available():
        return known_gpu(torch.cuda.get_device_name())
    return None if torch.accelerator.is_available() else this_cpu()


@dataclass(frozen=True)
class Errand:
    """What all processes do together.

    Attributes:
        stage: Name of the stage.
        plan: The conversion, as the first process planned it.
    """

    stage: str
    plan: ConversionPlan


def _write_together(run: Run) -> None:
    """Have the base write, as the first of all processes."""
    if run.found(WRITE) is not None:
        return
    from dllm_convert.training.distributed import meet

    prepare_writing(run)
    meet(run.place, Errand(WRITE.name, run.plan))
    run.do(WRITE)


def _train_together(run: Run, *, needed: bool) -> None:
    """Train, as the first of all processes; without a training let the others go."""
    if not run.trains and run.place.world == 1:
        return
    from dllm_convert.training.distributed import meet

    job = Errand(TRAIN.name, run.plan) if needed and run.found(TRAIN) is None else None
    if meet(run.place, job) is not None:
        run.do(TRAIN)
