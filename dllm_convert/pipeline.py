"""The whole conversion: source → plan → adapt → train → verify → card, resumable at every step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.console import Reporter
from dllm_convert.disk import link, sync_tree
from dllm_convert.manifest import source_facts
from dllm_convert.plan import ConversionPlan, make_plan, plan_as_dict
from dllm_convert.quiet import quiet_libraries
from dllm_convert.schema import Recipe
from dllm_convert.source import inspect_source
from dllm_convert.training.reporting import require_installed
from dllm_convert.workspace import Workspace, fingerprint, open_workspace

if TYPE_CHECKING:
    from dllm_convert.publish import PushOptions, PushResult
    from dllm_convert.training.data import TextData

FORMAT_VERSION = 1
"""Version of the manifest."""


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


def plan_conversion(recipe: Recipe) -> ConversionPlan:
    """Read the source's headers and plan; loads no weights and imports no torch.

    Raises:
        DllmConvertError: If the source cannot be read or the conversion cannot work.
    """
    return make_plan(recipe, inspect_source(recipe.source, revision=recipe.revision))


def run(
    recipe: Recipe, out: Path, reporter: Reporter, *, push: PushOptions | None = None
) -> RunResult:
    """Convert, train, verify and document a checkpoint.

    The same call on the same `out` goes on where an earlier one stopped.

    Args:
        recipe: The resolved recipe.
        out: Folder in which the checkpoint appears when it is whole.
        reporter: Progress.
        push: Where to publish a checkpoint that passed its verification.

    Raises:
        DllmConvertError: If a stage fails; what is finished is kept for the next call.
    """
    require_installed(recipe.training.report_to)
    plan = plan_conversion(recipe)
    if push is not None:
        from dllm_convert.publish.run import preflight

        # Hours of training are not to end in "not logged in".
        push = preflight({"source": source_facts(plan)}, push, reporter)
    run_id = fingerprint(recipe.identity(), plan.source.fingerprint)
    with open_workspace(out, run_id) as workspace:
        for warning in plan.warnings:
            reporter.warn(warning)
        with quiet_libraries():
            result = _Run(plan, workspace, reporter).finish()
        if push is None or not result.passed:
            return result
        from dllm_convert.publish.run import push_locked

        return replace(result, pushed=push_locked(out, push, reporter))


@dataclass
class _Run:
    plan: ConversionPlan
    workspace: Workspace
    reporter: Reporter

    def finish(self) -> RunResult:
        """Run what is left and return the manifest."""
        from dllm_convert.manifest import read_manifest

        stage, work = self.workspace.stage, self.workspace.work
        if self.workspace.result("assemble") is None:
            stage("materialise", lambda: {"folder": str(self._source)})
            stage("adapt", self._adapt)
            if self.plan.recipe.training.method == "none":
                stage("sample", lambda: self._sample(work / "untrained"))
            else:
                stage("baseline", self._baseline)
                stage("train", self._train)
                stage("measure", self._measure)
                stage("sample", lambda: self._sample(work / "trained"))
            stage("assemble", self._assemble)
        stage("verify", self._verify)
        stage("document", self._document)
        stage("publish", self.workspace.publish)
        self._clean()
        manifest = read_manifest(self.workspace.out)
        return RunResult(self.workspace.out, manifest, manifest["verification"]["passed"])

    @cached_property
    def _source(self) -> Path:
        from dllm_convert.materialise import materialise

        return materialise(self.plan.source, self.reporter)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.workspace.work / "untrained")

    @cached_property
    def _data(self) -> TextData:
        from dllm_convert.training.data import prepare_data

        folder = self.workspace.work / "data"
        return prepare_data(self.plan.recipe, self._tokenizer, self.reporter, folder)

    def _adapt(self) -> dict[str, Any]:
        from dllm_convert.weights import adapt

        target = self.workspace.work / "untrained"
        partial = target.with_name("untrained.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        with self.reporter.task("adapt"):
            adapt(self.plan, self._source, partial, self.reporter)
        sync_tree(partial)
        partial.rename(target)
        return {"tensors_changed": list(self.plan.tensors_changed)}

    def _load(self, folder: Path) -> Any:
        import torch

        from dllm_convert.training.setup import load_model

        model = load_model(folder, self.plan.adapter)
        return model.to("cuda") if torch.cuda.is_available() else model

    def _nelbo(self, model: Any) -> dict[str, Any]:
        from dllm_convert.diffusion.likelihood import nelbo
        from dllm_convert.diffusion.objective import Objective

        batches = self._on_device(model)
        with self.reporter.task("measure held-out NELBO", total=len(batches)) as task:
            objective = Objective.from_config(model.config)
            seed = self.plan.recipe.training.seed
            return dict(nelbo(model, batches, objective, seed=seed, task=task).as_dict())

    def _on_device(self, model: Any) -> list[Any]:
        return [batch.to(model.device) for batch in self._data.held_out]

    def _baseline(self) -> dict[str, Any]:
        from dllm_convert.diffusion.likelihood import autoregressive_nll

        model = self._load(self.workspace.work / "untrained")
        result: dict[str, Any] = {"data": self._data.facts, "nelbo_before": self._nelbo(model)}
        if self.plan.adapter.attention == "causal":
            batches = self._on_device(model)
            with self.reporter.task("measure the base's AR NLL", total=len(batches)) as task:
                rows = self.plan.mask.rows_before
                result["ar_nll"] = autoregressive_nll(model, batches, rows, task=task).as_dict()
        return {**result, "start": self._survey(model, result)}

    def _survey(self, model: Any, measured: dict[str, Any]) -> dict[str, Any]:
        from dllm_convert.training.expectation import explain, survey
        from dllm_convert.training.text_facts import look_at

        recipe, batches = self.plan.recipe, self._on_device(model)
        text = look_at(batches, self._tokenizer, filled=recipe.data.supervise_padding)
        start = survey(model, batches, measured, text, seed=recipe.training.seed)
        for problem in explain(start):
            self.reporter.warn(problem)
        return asdict(start)

    def _train(self) -> dict[str, Any]:
        from dllm_convert.training.expectation import Start
        from dllm_convert.training.run import train

        work = self.workspace.work
        start = Start(**self.workspace.stage("baseline", self._baseline)["start"])
        folders = work / "untrained", work / "trained", work
        return train(self.plan, self._data, *folders, self.reporter, start).as_dict()

    def _measure(self) -> dict[str, Any]:
        return {"nelbo_after": self._nelbo(self._load(self.workspace.work / "trained"))}

    def _sample(self, folder: Path) -> dict[str, Any]:
        from dllm_convert.sampling import DEFAULT_PROMPT
        from dllm_convert.sampling.run import decode_sample

        model = self._load(folder)
        with self.reporter.task("decode a sample"):
            return decode_sample(
                model, self._tokenizer, DEFAULT_PROMPT, max_new_tokens=32
            ).as_dict()

    def _assemble(self) -> dict[str, Any]:
        from dllm_convert.licences import write_notice
        from dllm_convert.manifest import write_manifest
        from dllm_convert.pictures import LOSS, draw_loss
        from dllm_convert.recipe import dump_recipe

        work, staged = self.workspace.work, self.workspace.staged
        trained = self.plan.recipe.training.method != "none"
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(work / ("trained" if trained else "untrained"), staged, copy_function=link)
        if trained:
            draw_loss(work / "metrics.jsonl", self._measurements(), staged / LOSS.file)
        write_notice(staged, source_facts(self.plan))
        (staged / "recipe.yaml").write_text(dump_recipe(self.plan.recipe), encoding="utf-8")
        write_manifest(staged, self._manifest())
        sync_tree(staged)
        return {}

    def _measurements(self) -> dict[str, Any]:
        result = self.workspace.result
        measurements = {**(result("baseline") or {}), **(result("measure") or {})}
        if result("train"):
            measurements["train"] = result("train")
        return measurements

    def _manifest(self) -> dict[str, Any]:
        from dllm_convert import __version__
        from dllm_convert.manifest import CARD_FILE, MANIFEST_FILE, hash_files, versions

        return {
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "dllm_convert": __version__,
            "versions": versions(),
            "source": source_facts(self.plan),
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "plan": plan_as_dict(self.plan),
            "seeds": {"training": self.plan.recipe.training.seed},
            "stages": self.workspace.stages,
            "measurements": self._measurements(),
            "sample": self.workspace.result("sample"),
            "files": hash_files(self.workspace.staged, exclude=(MANIFEST_FILE, CARD_FILE)),
        }

    def _verify(self) -> dict[str, Any]:
        from dllm_convert.verify import verify_checkpoint

        report = verify_checkpoint(
            self.workspace.staged,
            against=self._source,
            quality=self._measurements(),
            untrained=self.plan.recipe.training.method == "none",
            reporter=self.reporter,
        )
        return dict(report.as_dict())

    def _document(self) -> dict[str, Any]:
        from dllm_convert.card import write_card
        from dllm_convert.manifest import read_manifest, write_manifest

        staged, workspace = self.workspace.staged, self.workspace
        # The files were hashed when they were put together; hashing them again reads every weight.
        later = {"stages": workspace.stages, "verification": workspace.result("verify")}
        write_manifest(staged, read_manifest(staged) | later)
        write_card(staged)
        sync_tree(staged)
        return {}

    def _clean(self) -> None:
        """Drop what the finished checkpoint makes superfluous; keep the journal and the metrics."""
        for name in ("untrained", "trained", "trainer", "data"):
            shutil.rmtree(self.workspace.work / name, ignore_errors=True)
