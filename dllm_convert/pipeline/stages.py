"""What a run does, stage by stage: each is recorded when it is done, and never done twice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from dllm_convert.common.disk import link, sync_tree
from dllm_convert.errors import VerificationError
from dllm_convert.pipeline.options import Depth
from dllm_convert.pipeline.resumed import check_resumed
from dllm_convert.pipeline.stage_measures import Measures
from dllm_convert.planning.conversion import plan_as_dict, source_facts

FORMAT_VERSION = 1
"""Version of the manifest."""


class Stages(Measures):
    """The stages of one run, in their order."""

    def finish(self) -> None:
        """Run what is left; the checkpoint stands in the output folder afterwards."""
        if self._trains:
            from dllm_convert.training.setup import require_devices

            require_devices(self.plan.recipe.training)
        check_resumed(self.workspace, self.plan, lambda: self._source, trains=self._trains)
        stage, assembled = self.workspace.stage, self.workspace.result("assemble") is not None
        if not assembled:
            stage("materialise", lambda: {"folder": str(self._source.folder)})
            stage("adapt", self._adapt)
            if self._trains:
                stage("baseline", self._baseline)
        self._train_together(needed=self._trains and not assembled)
        if not assembled:
            if self._trains:
                stage("measure", self._measure)
            if not self.light:
                stage("views", self._views)
                stage("sample", self._sample)
            stage("assemble", self._assemble)
        verified = stage("verify", self._verify)
        if self.workspace.extends is not None and verified["passed"] is False:
            raise VerificationError(
                f"what was trained on failed its verification ({failed_names(verified)}) and does "
                f"not replace {self.workspace.out}",
                hint=f"It lies in {self.workspace.staged}; --extend with other options begins anew",
            )
        stage("document", self._document)
        stage("publish", self.workspace.publish)
        self._clean()

    def _adapt(self) -> dict[str, Any]:
        from dllm_convert.weights.run import adapt

        target = self.workspace.work / "untrained"
        partial = target.with_name("untrained.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        if self.workspace.extends is not None:
            from dllm_convert.pipeline.extension import take_over

            taken = take_over(self.plan, self.workspace.out, partial)
            sync_tree(partial)
            partial.rename(target)
            return taken
        with self.reporter.task("adapt"):
            how = {"link": self.how.link, "light": self.light}
            made = adapt(self.plan, self._source.folder, partial, self.reporter, **how)
        sync_tree(partial)
        partial.rename(target)
        return {
            "tensors_changed": list(self.plan.tensors_changed),
            "source_files": dict(self._source.originals or made.source),
            "files": dict(made.files),
            "ways": dict(made.ways),
        }

    def _train_together(self, *, needed: bool) -> None:
        if not self._trains and self.place.world == 1:
            return
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

    def _assemble(self) -> dict[str, Any]:
        from dllm_convert.card.licences import write_notice
        from dllm_convert.card.pictures import DENOISING, draw_all
        from dllm_convert.common.manifest import write_manifest
        from dllm_convert.recipe.loading import dump_recipe

        staged = self.workspace.staged
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(self._weights, staged, copy_function=link)
        draw_all(self._measurements(), staged)
        # A run that an earlier version began has recorded none.
        recorded = self.workspace.work / DENOISING.file
        if recorded.is_file():
            link(recorded, staged / DENOISING.file)
        write_notice(staged, source_facts(self.plan))
        (staged / "recipe.yaml").write_text(dump_recipe(self.plan.recipe), encoding="utf-8")
        write_manifest(staged, self._manifest())
        sync_tree(staged)
        return {}

    def _manifest(self) -> dict[str, Any]:
        from dllm_convert.common.manifest import WRITTEN_LAST, hash_files, versions
        from dllm_convert.common.manifest_form import MANIFEST_VERSION
        from dllm_convert.common.version import __version__

        adapted, extends = self.workspace.result("adapt") or {}, self.workspace.extends
        ways = {} if self._trains else adapted.get("ways", {})
        known = {name: adapted["files"][name] for name in ways}
        later = hash_files(self.workspace.staged, exclude=(*WRITTEN_LAST, *known))
        return {
            "format_version": MANIFEST_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "dllm_convert": __version__,
            "versions": versions(),
            "source": source_facts(self.plan) | {"files": adapted.get("source_files", {})},
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "plan": plan_as_dict(self.plan),
            "seeds": {"training": self.plan.recipe.training.seed},
            "stages": self.workspace.stages,
            "measurements": self._measurements(),
            "sample": self.workspace.result("sample"),
            "files": dict(sorted((known | later).items())),
            **({"history": extends["history"]} if extends else {}),
        }

    def _verify(self) -> dict[str, Any]:
        if self.light:
            from dllm_convert.verification.bytes import verify_staged

            ways = (self.workspace.result("adapt") or {})["ways"]
            reason = self.how.reason(self.plan.source.parameters)
            staged, base = self.workspace.staged, self._source.folder
            return verify_staged(staged, base, self.plan, ways, reason, self.reporter).as_dict()
        if self.how.verify is Depth.FILES:
            from dllm_convert.verification.bytes import verify_folder

            staged, reason = self.workspace.staged, self.how.reason(self.plan.source.parameters)
            return verify_folder(staged, self._source.folder, self.reporter, reason).as_dict()
        from dllm_convert.verification import verify_checkpoint

        report = verify_checkpoint(
            self.workspace.staged,
            against=self._source.folder,
            quality=self._measurements(),
            untrained=not self._trains,
            reporter=self.reporter,
        )
        return dict(report.as_dict())

    def _document(self) -> dict[str, Any]:
        from dllm_convert.card.readme import write_card
        from dllm_convert.card.report import write_report
        from dllm_convert.common.manifest import read_manifest, write_manifest

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
        from dllm_convert.card.pictures import DENOISING

        for name in ("untrained", "trained", "trainer", "data"):
            shutil.rmtree(self.workspace.work / name, ignore_errors=True)
        (self.workspace.work / DENOISING.file).unlink(missing_ok=True)


def failed_names(verification: Mapping[str, Any]) -> str:
    """Return the names of the probes that failed."""
    return ", ".join(p["name"] for p in verification["probes"] if p["passed"] is False)
