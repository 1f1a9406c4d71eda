"""The parts of a run that its stages share, and the stages that measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.console import Reporter
from dllm_convert.common.ranks import Place
from dllm_convert.modeling.converted_config import diffusion_section
from dllm_convert.pipeline.options import DEFAULT, How
from dllm_convert.pipeline.workspace import Workspace
from dllm_convert.planning.conversion import ConversionPlan

if TYPE_CHECKING:
    from dllm_convert.source.materialise import Materialised
    from dllm_convert.training.data.text import TextData


@dataclass
class Measures:
    """What a run measures of its models, and what it reads for that, each once.

    Attributes:
        plan: The conversion.
        workspace: Output folder and journal.
        reporter: Progress.
        place: This process.
        how: What does not change the result: links, how much is verified.
    """

    plan: ConversionPlan
    workspace: Workspace
    reporter: Reporter
    place: Place
    how: How = DEFAULT

    @property
    def _trains(self) -> bool:
        return self.plan.recipe.training.method != "none"

    @property
    def light(self) -> bool:
        """Whether the run does without the model: no training, and only files are verified."""
        return not self._trains and self.how.streams(self.plan.source.parameters)

    @property
    def _weights(self) -> Path:
        return self.workspace.work / ("trained" if self._trains else "untrained")

    @cached_property
    def _source(self) -> Materialised:
        from dllm_convert.source.materialise import materialise

        return materialise(self.plan.source, self.reporter)

    @cached_property
    def _tokenizer(self) -> Any:
        from dllm_convert.source.tokenizer_loading import load_tokenizer

        return load_tokenizer(self.workspace.work / "untrained")

    @cached_property
    def _data(self) -> TextData:
        from dllm_convert.training.data.text import prepare_data

        folder = self.workspace.work / "data"
        return prepare_data(self.plan.recipe, self._tokenizer, self.reporter, folder)

    def _load(self, folder: Path) -> Any:
        import torch

        from dllm_convert.modeling.loading import load_model

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
        converted_before = diffusion_section(self.plan.source.config) is not None
        # A source that is a diffusion model has no autoregressive likelihood of its own.
        if self.plan.adapter.attention == "causal" and not converted_before:
            batches = self._on_device(model)
            rows = self.plan.mask.rows_before
            if any(bool((batch.tokens[batch.scorable] >= rows).any()) for batch in batches):
                self.reporter.warn(
                    "the held-out text has tokens for which the base has no row, so the base's own "
                    "likelihood is not measured"
                )
                return {**result, "start": self._survey(model, result)}
            with self.reporter.task("measure the base's AR NLL", total=len(batches)) as task:
                result["ar_nll"] = autoregressive_nll(model, batches, rows, task=task).as_dict()
        return {**result, "start": self._survey(model, result)}

    def _survey(self, model: Any, measured: dict[str, Any]) -> dict[str, Any]:
        from dllm_convert.training.data.text_facts import look_at
        from dllm_convert.training.expectation import explain, survey

        recipe, batches = self.plan.recipe, self._on_device(model)
        text = look_at(batches, self._tokenizer, filled=recipe.data.supervise_padding)
        start = survey(model, batches, measured, text, seed=recipe.training.seed)
        for problem in explain(start):
            self.reporter.warn(problem)
        return asdict(start)

    def _measure(self) -> dict[str, Any]:
        return {"nelbo_after": self._nelbo(self._load(self.workspace.work / "trained"))}

    def _views(self) -> dict[str, Any]:
        """Measure what the pictures show."""
        from dllm_convert.verification.observe.logged import read_curves
        from dllm_convert.verification.observe.views import observe_run

        work, trains = self.workspace.work, self._trains
        with self.reporter.task("measure what the pictures show"):
            seen = observe_run(
                self._weights,
                self._source.folder,
                untrained=work / "untrained" if trains else None,
                held_out=self._data.held_out if trains else (),
                load=self._load,
                seed=self.plan.recipe.training.seed,
            )
        curves = read_curves(work / "metrics.jsonl") if trains else {}
        thinned = {name: curve.thinned() for name, curve in curves.items()}
        return replace(seen, curves=thinned).as_dict()

    def _sample(self) -> dict[str, Any]:
        from dllm_convert.card.pictures import DENOISING
        from dllm_convert.sampling import DEFAULT_PROMPT
        from dllm_convert.sampling.run import decode_sample, fit, record, recorder_of

        model, out = self._load(self._weights), self.workspace.work / DENOISING.file
        recorder = recorder_of(model)
        with self.reporter.task("decode a sample"):
            prompt, new = fit(model, self._tokenizer, DEFAULT_PROMPT, 32)
            sample = decode_sample(
                model, self._tokenizer, prompt, max_new_tokens=new, observer=recorder
            )
            record(recorder, self._tokenizer, out)
        return sample.as_dict()

    def _measurements(self) -> dict[str, Any]:
        result = self.workspace.result
        measured = (result(name) or {} for name in ("baseline", "measure", "views"))
        measurements = {key: value for stage in measured for key, value in stage.items()}
        if result("train"):
            measurements["train"] = result("train")
        return measurements
