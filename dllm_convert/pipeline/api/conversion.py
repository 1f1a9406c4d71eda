"""From a source to a checkpoint: recipe, plan, conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from dllm_convert.common.console import Reporter
from dllm_convert.common.ranks import Rank
from dllm_convert.common.tables import Block, Printed
from dllm_convert.errors import IncompatibleError, RequestError
from dllm_convert.pipeline.api.publication import push_options
from dllm_convert.pipeline.asked import ConversionRequest, LaunchRequest, launch_of
from dllm_convert.pipeline.options import Depth, RunOptions
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.launch import ALONE, Launch
from dllm_convert.recipe.schema import Recipe
from dllm_convert.recipe.typed import default_out

if TYPE_CHECKING:
    from dllm_convert.probing import ProbeReport
    from dllm_convert.publishing import PushOptions, PushResult
    from dllm_convert.verification.report import VerificationReport


@dataclass(frozen=True)
class Conversion(Printed):
    """A finished conversion.

    Attributes:
        path: Folder of the checkpoint.
        manifest: Content of its dllm_convert.json.
        report: Its verification, which may have failed: look at `report.passed`.
        pushed: What was published, None if nothing was asked for or verification failed.
    """

    path: Path
    manifest: Mapping[str, Any]
    report: VerificationReport
    pushed: PushResult | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what `run --json` prints."""
        from dllm_convert.pipeline.shown import run_document

        published = self.pushed.as_dict() if self.pushed else None
        passed = self.manifest["verification"]["passed"]
        return run_document(str(self.path), passed, self.manifest, published)

    def as_blocks(self) -> list[Block]:
        """Return the verdict, what failed, what it came to, a sample, and what to do with it."""
        from dllm_convert.pipeline.shown import run_blocks

        return run_blocks(self.as_dict())

    def as_details(self) -> list[Block]:
        """Return every probe, all that was measured, and a sample."""
        from dllm_convert.pipeline.shown import detail_blocks

        return detail_blocks(self.as_dict())


def load_recipe(source: str | Path | Recipe, **asked: Unpack[ConversionRequest]) -> Recipe:
    """Resolve a recipe, the presets it inherits and what is asked into one value.

    Args:
        source: Recipe name or .yaml file, Hub id, folder or .gguf file, tried in that order.
        **asked: What wins over it, see `plan`.

    Raises:
        RequestError: What is asked contradicts itself, or would change nothing.
        IncompatibleError: There is no such recipe, or a field or value of it is wrong.
        HubError: A source on the Hub cannot be asked whether it is a conversion.
    """
    from dllm_convert.pipeline.asked import resolve

    return resolve(source, **asked)


def plan(
    source: str | Path | Recipe | ConversionPlan, **asked: Unpack[ConversionRequest]
) -> ConversionPlan:
    """Decide everything a conversion will do; reads headers only. Printed, it is what `check` says.

    Args:
        source: Recipe name or .yaml file, Hub id, folder or .gguf file, tried in that order; or a
            recipe or an earlier plan, of which what is asked is changed.
        **asked: `to` and `block` (what to convert to), `data`, `steps`, `tokens`, `max_time`,
            `global_batch`, `preset`, `serve`, `lora`, `full`, `train`, `keep_adapter`,
            `keep_base`, `revision`, `allow_pickle`, `allow_generic`, `allow_epochs`, `report_to`,
            `processes`, `num_machines`, `launch_config` (who trains; of a plan, as it was),
            and `overrides` for every other field of a recipe by its dotted name; see
            `dllm_convert.pipeline.asked.ConversionRequest`.

    Raises:
        DllmConvertError: The source cannot be read, or cannot be converted as asked.
    """
    from dllm_convert.pipeline.run import plan_conversion

    if isinstance(source, ConversionPlan):
        asked = {**_launched(source), **asked}
    return plan_conversion(_recipe_of(source, asked), launch=launch_of(asked))


def _launched(plan: ConversionPlan) -> LaunchRequest:
    """Return how the launch of a plan was asked for."""
    launch = plan.launch
    if launch == ALONE:
        return {}
    return {
        "processes": launch.processes,
        "num_machines": launch.machines,
        "launch_config": launch.config,
    }


def probe(
    source: str | Path | Recipe | ConversionPlan, **asked: Unpack[ConversionRequest]
) -> ProbeReport:
    """Measure on a small random instance whether a family can be converted; loads no weights.

    Args:
        source: As in `plan`. A family that has an adapter is measured as well.
        **asked: As in `plan`; what it says of the source matters here.

    Returns:
        What was measured; its `adapter` is None if the family cannot be converted.

    Raises:
        DllmConvertError: The source cannot be read, or does not say enough to be measured.
    """
    from dllm_convert.pipeline.family import probe_recipe

    return probe_recipe(_recipe_of(source, asked))


def _recipe_of(source: str | Path | Recipe | ConversionPlan, asked: ConversionRequest) -> Recipe:
    return load_recipe(source.recipe if isinstance(source, ConversionPlan) else source, **asked)


def convert(
    source: str | Path | Recipe | ConversionPlan,
    out: str | Path | None = None,
    *,
    push: str | PushOptions | None = None,
    link: bool = False,
    verify: str = "auto",
    extend: bool = False,
    num_processes: int | None = None,
    reporter: Reporter | None = None,
    **asked: Unpack[ConversionRequest],
) -> Conversion:
    """Convert, train, verify and document a checkpoint; the same call goes on where it stopped.

    Args:
        source: As in `plan`.
        out: Folder in which the checkpoint appears when it is whole; None is ./NAME-TARGET.
        push: Repository, or `PushOptions`, to publish a checkpoint at that passed verification.
        link: Hard-link weight files that do not change, instead of copying them.
        verify: `full` runs the model, `files` reads files only, `auto` is full after training and
            for models up to 1 GiB in float32.
        extend: Train the finished checkpoint in `out` on.
        num_processes: Train with so many processes, one per GPU; None: in this one, or as a plan or
            a `launch_config` says.
        reporter: Progress; None tells it on stderr. Of several processes only the first tells
            its own, quietly or not as the reporter does.
        **asked: As in `plan`.

    Raises:
        DllmConvertError: A stage failed; what is finished is kept for the next call.
    """
    if isinstance(source, ConversionPlan):
        asked = {**_launched(source), **asked}
    if num_processes is not None:
        asked["processes"] = num_processes
    recipe = _recipe_of(source, asked)
    if verify not in list(Depth):
        raise RequestError(f"verify is {verify!r}, expected one of {', '.join(Depth)}")
    if extend and recipe.training.method == "none":
        raise RequestError("`extend` trains on; leave out `train=False`")
    if Rank.from_environment().world > 1:
        raise IncompatibleError(
            "this is one of several processes, and convert() works in one",
            hint="convert(..., num_processes=N) starts several; or torchrun -m dllm_convert run",
        )
    options = push_options(push) if isinstance(push, str) else push
    how = RunOptions(link=link, verify=Depth(verify), extend=extend)
    folder = default_out(recipe) if out is None else Path(out)
    teller = reporter or Reporter()
    launched = launch_of(asked)
    if launched.strategy != "none":
        return _convert_together(recipe, folder, teller, options, how, launched)
    return convert_recipe(recipe, folder, teller, push=options, how=how)


def _convert_together(
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    push: PushOptions | None,
    how: RunOptions,
    launched: Launch,
) -> Conversion:
    """Have several processes convert; what is published is published by this one."""
    from dllm_convert.common.manifest import read_manifest
    from dllm_convert.common.work_folder import locked
    from dllm_convert.pipeline.run import plan_conversion
    from dllm_convert.pipeline.together import run_together
    from dllm_convert.planning.conversion import source_facts
    from dllm_convert.publishing.run import preflight, push_locked
    from dllm_convert.verification.report import VerificationReport

    if push is not None:
        source = source_facts(plan_conversion(recipe, out))
        push = preflight({"source": source}, push, reporter)
    run_together(recipe, out, how, launched=launched, quiet=reporter.quiet)
    manifest = read_manifest(out)
    report = VerificationReport.from_dict(manifest["verification"])
    pushed = None
    if push is not None and report.passed:
        with locked(out):
            pushed = push_locked(out, push, reporter)
    return Conversion(out, manifest, report, pushed)


def convert_recipe(
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    *,
    push: PushOptions | None = None,
    place: Rank | None = None,
    how: RunOptions | None = None,
) -> Conversion:
    """Convert as a resolved recipe says, in the first of perhaps several processes."""
    from dllm_convert.pipeline import run as pipeline
    from dllm_convert.verification.report import VerificationReport

    done = pipeline.run(
        recipe, out, reporter, push=push, place=place or Rank(), how=how or RunOptions()
    )
    report = VerificationReport.from_dict(done.manifest["verification"])
    return Conversion(done.path, done.manifest, report, done.pushed)
