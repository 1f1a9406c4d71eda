"""What a run does, stage by stage: each is recorded when it is done, and never done twice."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.console import Reporter
from dllm_convert.disk import link, sync_tree
from dllm_convert.manifest import source_facts
from dllm_convert.place import Place
from dllm_convert.plan import ConversionPlan, plan_as_dict
from dllm_convert.workspace import Workspace

if TYPE_CHECKING:
    from dllm_convert.training.data import TextData

FORMAT_VERSION = 1
"""Version of the manifest."""


@dataclass
class Stages:
    """The stages of one run, in their order.

    Attributes:
        plan: The conversion.
        workspace: Output folder and journal.
        reporter: Progress.
        place: This process.
    """

    plan: ConversionPlan
    workspace: Workspace
    reporter: Reporter
    place: Place

    def finish(self) -> None:
        """Run what is left; the checkpoint stands in the output folder afterwards."""
        from dllm_convert.training.setup import require_devices

        require_devices(self.plan.recipe.training)
        stage, assembled = self.workspace.stage, self.workspace.result("assemble") is not None
        if not assembled:
            stage("materialise", lambda: {"folder": str(self._source)})
            stage("adapt", self._adapt)
            if self._trains:
                stage("baseline", self._baseline)
        self._train_together(needed=self._trains and not assembled)
        if not assembled:
            if self._trains:
                stage("measure", self._measure)
            stage("views", self._views)
            stage("sample", self._sample)
            stage("assemble", self._assemble)
        stage("verify", self._verify)
        stage("document", self._document)
        stage("publish", self.workspace.publish)
        self._clean()

    @property
    def _trains(self) -> bool:
        return self.plan.recipe.training.method != "none"

    @property
    def _weights(self) -> Path:
        return self.workspace.work / ("trained" if self._trains else "untrained")

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

    def _train_together(self, *, needed: bool) -> None:
        from dllm_convert.training.distributed import meet

        if meet(self.place, needed and self.workspace.result("train") is None):
            self.workspace.stage("train", self.train)

    def train(self) -> dict[str, Any]:
        """Train; of several processes each has to call it."""
        from dllm_convert.training.expectation import Start
        from dllm_convert.training.run import train

        work, baseline = self.workspace.work, self.workspace.result("baseline")
        if baseline is None:
            raise RuntimeError("training before its baseline was measured")
        folders = work / "untrained", work / "trained", work
        start = Start(**baseline["start"])
        return train(self.plan, self._data, *folders, self.reporter, start).as_dict()

    def _measure(self) -> dict[str, Any]:
        return {"nelbo_after": self._nelbo(self._load(self.workspace.work / "trained"))}

    def _views(self) -> dict[str, Any]:
        """Measure what the pictures show."""
        from dllm_convert.logged import read_curves
        from dllm_convert.verify.views import observe_run

        work, trains = self.workspace.work, self._trains
        with self.reporter.task("measure what the pictures show"):
            seen = observe_run(
                self._weights,
                self._source,
                untrained=work / "untrained" if trains else None,
                held_out=self._data.held_out if trains else (),
                load=self._load,
                seed=self.plan.recipe.training.seed,
            )
        curves = read_curves(work / "metrics.jsonl") if trains else {}
        thinned = {name: curve.thinned() for name, curve in curves.items()}
        return replace(seen, curves=thinned).as_dict()

    def _sample(self) -> dict[str, Any]:
        from dllm_convert.sampling import DEFAULT_PROMPT
        from dllm_convert.sampling.run import decode_sample

        model = self._load(self._weights)
        with self.reporter.task("decode a sample"):
            return decode_sample(
                model, self._tokenizer, DEFAULT_PROMPT, max_new_tokens=32
            ).as_dict()

    def _assemble(self) -> dict[str, Any]:
        from dllm_convert.licences import write_notice
        from dllm_convert.manifest import write_manifest
        from dllm_convert.pictures import draw_all
        from dllm_convert.recipe import dump_recipe

        staged = self.workspace.staged
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(self._weights, staged, copy_function=link)
        draw_all(self._measurements(), staged)
        write_notice(staged, source_facts(self.plan))
        (staged / "recipe.yaml").write_text(dump_recipe(self.plan.recipe), encoding="utf-8")
        write_manifest(staged, self._manifest())
        sync_tree(staged)
        return {}

    def _measurements(self) -> dict[str, Any]:
        result = self.workspace.result
        measured = (result(name) or {} for name in ("baseline", "measure", "views"))
        measurements = {key: value for stage in measured for key, value in stage.items()}
        if result("train"):
            measurements["train"] = result("train")
        return measurements

    def _manifest(self) -> dict[str, Any]:
        from dllm_convert import __version__
        from dllm_convert.manifest import WRITTEN_LAST, hash_files, versions

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
            "files": hash_files(self.workspace.staged, exclude=WRITTEN_LAST),
        }

    def _verify(self) -> dict[str, Any]:
        from dllm_convert.verify import verify_checkpoint

        report = verify_checkpoint(
            self.workspace.staged,
            against=self._source,
            quality=self._measurements(),
            untrained=not self._trains,
            reporter=self.reporter,
        )
        return dict(report.as_dict())

    def _document(self) -> dict[str, Any]:
        from dllm_convert.card import write_card
        from dllm_convert.manifest import read_manifest, write_manifest
        from dllm_convert.report_page import write_report

        staged, workspace = self.workspace.staged, self.workspace
        # The files were hashed when they were put together; hashing them again reads every weight.
        later = {"stages": workspace.stages, "verification": workspace.result("verify")}
        write_manifest(staged, read_manifest(staged) | later)
        write_report(staged)
        write_card(staged)
        sync_tree(staged)
        return {}

    def _clean(self) -> None:
        """Drop what the finished checkpoint makes superfluous; keep the journal and the metrics."""
        for name in ("untrained", "trained", "trainer", "data"):
            shutil.rmtree(self.workspace.work / name, ignore_errors=True)
