"""The stages that make: fetch, adapt, train, put together, verify, document, publish."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dllm_convert.common.disk import link, sync_tree
from dllm_convert.pipeline.context import Run, Stage
from dllm_convert.pipeline.measures import BASELINE, MEASURE, SAMPLE, VIEWS
from dllm_convert.pipeline.options import Depth
from dllm_convert.pipeline.results import Adapted, Done, Fetched, Recorded, Section, Verified
from dllm_convert.planning.conversion import plan_as_dict, source_facts


def _materialise(run: Run) -> Fetched:
    return Fetched(folder=str(run.source.folder))


def _adapt(run: Run) -> Adapted:
    """Write the untrained conversion, or lay a finished one in its place."""
    partial = run.untrained.with_name("untrained.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(run.untrained, ignore_errors=True)
    adapted = _written(run, partial) if run.workspace.extends is None else _taken_over(run, partial)
    sync_tree(partial)
    partial.rename(run.untrained)
    return adapted


def _written(run: Run, folder: Path) -> Adapted:
    from dllm_convert.weights.run import adapt

    with run.reporter.task("adapt"):
        made = adapt(
            run.plan, run.source.folder, folder, run.reporter, link=run.how.link, light=run.light
        )
    return Adapted(
        tensors_changed=list(run.plan.tensors_changed),
        source_files=dict(run.source.originals or made.source),
        files=dict(made.files),
        ways=dict(made.ways),
    )


def _taken_over(run: Run, folder: Path) -> Adapted:
    from dllm_convert.pipeline.extension import take_over

    return take_over(run.plan, run.workspace.out, folder)


def _train(run: Run) -> Recorded:
    """Train; of several processes each has to call it."""
    from dllm_convert.training.expectation import Start
    from dllm_convert.training.pacing import Pace
    from dllm_convert.training.run import train

    baseline = run.found(BASELINE)
    if baseline is None:
        raise RuntimeError("training before its baseline was measured")
    work, start = run.workspace.work, Start(**baseline.start)
    known = run.workspace.pace

    def keep(pace: Pace) -> None:
        if not run.place.main:
            return
        run.workspace.pace = pace.as_dict()
        run.workspace.record()

    result = train(
        *(run.plan, run.data, run.untrained, run.trained, work, run.reporter, start),
        pace=None if known is None else Pace(**known),
        settled=keep,
    )
    return Recorded(result.as_dict())


def _assemble(run: Run) -> Done:
    """Put the checkpoint together: weights, pictures, notice, recipe, manifest."""
    from dllm_convert.card.licences import write_notice
    from dllm_convert.card.pictures import DENOISING, draw_all
    from dllm_convert.common.manifest import RECIPE_FILE, write_manifest
    from dllm_convert.recipe.loading import dump_recipe

    staged = run.workspace.staged
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(run.weights, staged, copy_function=link)
    draw_all(measurements(run), staged)
    recorded = run.workspace.work / DENOISING.file
    if recorded.is_file():  # A run without the model has none.
        link(recorded, staged / DENOISING.file)
    write_notice(staged, source_facts(run.plan))
    (staged / RECIPE_FILE).write_text(dump_recipe(run.plan.recipe), encoding="utf-8")
    write_manifest(staged, _manifest(run))
    sync_tree(staged)
    return Done()


def measurements(run: Run) -> dict[str, Any]:
    """Return the section `measurements` of the manifest, as far as it was measured."""
    found = (run.found(BASELINE), run.found(MEASURE), run.found(VIEWS))
    values: dict[str, Any] = {}
    for result in found:
        values |= result.as_dict() if result is not None else {}
    trained = run.found(TRAIN)
    return values if trained is None else values | {"train": trained.as_dict()}


def _manifest(run: Run) -> dict[str, Any]:
    from dllm_convert.common.manifest import WRITTEN_LAST, hash_files, versions
    from dllm_convert.common.manifest_form import MANIFEST_VERSION
    from dllm_convert.common.version import __version__

    adapted, extends = run.found(ADAPT) or Adapted(), run.workspace.extends
    # Files that training did not touch were hashed when they were written.
    known = {} if run.trains else {name: adapted.files[name] for name in adapted.ways}
    later = hash_files(run.workspace.staged, exclude=(*WRITTEN_LAST, *known))
    sample = run.found(SAMPLE)
    return {
        "format_version": MANIFEST_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dllm_convert": __version__,
        "versions": versions(),
        "source": source_facts(run.plan) | {"files": adapted.source_files},
        "recipe": run.plan.recipe.model_dump(mode="json"),
        "plan": plan_as_dict(run.plan),
        "seeds": {"training": run.plan.recipe.training.seed},
        "stages": run.workspace.stages,
        "measurements": measurements(run),
        "sample": None if sample is None else sample.as_dict(),
        "files": dict(sorted((known | later).items())),
        **({"history": extends["history"]} if extends else {}),
    }


def _verify(run: Run) -> Verified:
    """Verify what stands ready, as deep as is asked for."""
    return Verified(**_report(run))


def _report(run: Run) -> Section:
    staged, base = run.workspace.staged, run.source.folder
    reason = run.how.reason(run.plan.source.parameters)
    if run.light:
        from dllm_convert.verification.bytes import verify_staged

        ways = (run.found(ADAPT) or Adapted()).ways
        return verify_staged(staged, base, run.plan, ways, reason, run.reporter).as_dict()
    if run.how.verify is Depth.FILES:
        from dllm_convert.verification.bytes import verify_folder

        return verify_folder(staged, base, run.reporter, reason).as_dict()
    from dllm_convert.verification import verify_checkpoint

    report = verify_checkpoint(
        staged,
        against=base,
        quality=measurements(run),
        untrained=not run.trains,
        reporter=run.reporter,
    )
    return dict(report.as_dict())


def _document(run: Run) -> Done:
    """Write the verification into the manifest, then the report and the card."""
    from dllm_convert.card.readme import write_card
    from dllm_convert.card.report import write_report
    from dllm_convert.common.manifest import read_manifest, write_manifest

    staged, workspace = run.workspace.staged, run.workspace
    # The files were hashed when they were put together; hashing them again reads every weight.
    later = {"stages": workspace.stages, "verification": workspace.result("verify")}
    write_manifest(staged, read_manifest(staged) | later)
    write_report(staged)
    write_card(staged)
    sync_tree(staged)
    return Done()


def _appear(run: Run) -> Done:
    run.workspace.publish()
    return Done()


def clean(run: Run) -> None:
    """Drop what the finished checkpoint makes superfluous; keep the journal and the metrics."""
    from dllm_convert.card.pictures import DENOISING

    for name in ("untrained", "trained", "trainer", "data"):
        shutil.rmtree(run.workspace.work / name, ignore_errors=True)
    (run.workspace.work / DENOISING.file).unlink(missing_ok=True)


MATERIALISE = Stage("materialise", Fetched, _materialise)
ADAPT = Stage("adapt", Adapted, _adapt)
TRAIN = Stage("train", Recorded, _train)
ASSEMBLE = Stage("assemble", Done, _assemble)
VERIFY = Stage("verify", Verified, _verify, loads=True)
DOCUMENT = Stage("document", Done, _document)
APPEAR = Stage("publish", Done, _appear)
