"""The stages that measure: held-out text before and after training, pictures, a sample."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.common.memory import free_memory
from dllm_convert.pipeline.context import Run, Stage
from dllm_convert.pipeline.results import Baseline, Measured, Recorded, Section
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.devices import GPUS, USABLE_MEMORY
from dllm_convert.planning.estimate import stages_on
from dllm_convert.planning.stages import largest_stage

_LEAST_DRAWN = 8
"""Sequences times draws of noise that a bound is a mean of, at least."""


def measured_in(run: Run) -> dict[str, Any]:
    """Return the device and the type in which this run is measured, as `planning/stages.py` plans.

    On a GPU that is the type of the training's matrix products, and never its 4 bits: what is
    measured is what will be published. What several GPUs train, or 4 bits, may have no room on one;
    it is measured in host memory then.
    """
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu", "dtype": torch.float32}
    from dllm_convert.training.setup import use_bf16

    bf16 = use_bf16(run.plan.recipe.training)
    dtype = torch.bfloat16 if bf16 else torch.float32
    room = torch.cuda.mem_get_info()[1]
    fits = _taken_on_gpu(run.plan, dtype.itemsize, room) <= room * USABLE_MEMORY
    return {"device": "cuda" if fits else "cpu", "dtype": dtype}


def _taken_on_gpu(plan: ConversionPlan, held: int, room: int) -> int:
    """Return the bytes that measuring takes on a GPU, as it was planned.

    Args:
        plan: The conversion.
        held: Bytes of a weight.
        room: Bytes of memory of the GPU.
    """
    if plan.shape is None:
        return plan.source.parameters * held
    device, causal = replace(GPUS[0], memory=room), plan.adapter.attention == "causal"
    stages = stages_on(plan.shape, plan.recipe, device, causal=causal)
    return largest_stage(stages, alone=True).device


def load(run: Run, folder: Path) -> Any:
    """Load a model of this run to measure it; one at a time."""
    from dllm_convert.modeling.loading import load_model

    return load_model(folder, run.plan.adapter, **measured_in(run))


def _load_base(run: Run, folder: Path) -> Any:
    from dllm_convert.modeling.loading import load_base

    return load_base(folder, run.plan.adapter, **measured_in(run))


def _baseline(run: Run) -> Baseline:
    """Measure the untrained conversion and, where it has a likelihood of its own, the base."""
    import torch

    if torch.cuda.is_available() and measured_in(run)["device"] == "cpu":
        run.reporter.line("measured on the CPU: it has no room on one GPU")
    model = load(run, run.untrained)
    before, ar_nll = _nelbo(run, model), _base_nll(run, model)
    start = _survey(run, model, {"nelbo_before": before, "ar_nll": ar_nll})
    return Baseline(data=run.data.facts, nelbo_before=before, start=start, ar_nll=ar_nll)


def _nelbo(run: Run, model: Any) -> Section:
    from dllm_convert.diffusion.likelihood import nelbo
    from dllm_convert.diffusion.objective import Objective

    batches = _held_out(run, model)
    # Of few sequences one draw of noise says next to nothing.
    draws = max(1, _LEAST_DRAWN // sum(len(batch.tokens) for batch in batches))
    with run.reporter.task("measure held-out NELBO", total=draws * len(batches)) as task:
        objective, seed = Objective.from_config(model.config), run.plan.recipe.training.seed
        bound = nelbo(model, batches, objective, seed=seed, draws=draws, task=task)
        return dict(bound.as_dict())


def _base_nll(run: Run, model: Any) -> Section | None:
    """Measure the base's own likelihood; None if it has none, or none of this text."""
    from dllm_convert.diffusion.likelihood import autoregressive_nll
    from dllm_convert.diffusion.objective import Objective

    # A source that is a diffusion model has no autoregressive likelihood of its own.
    if (
        run.plan.adapter.attention != "causal"
        or diffusion_section(run.plan.source.config) is not None
    ):
        return None
    batches, rows = _held_out(run, model), run.plan.mask.rows_before
    if any(bool((batch.tokens[batch.scorable] >= rows).any()) for batch in batches):
        run.reporter.warn(
            "the held-out text has tokens for which the base has no row, so the base's own "
            "likelihood is not measured"
        )
        return None
    with run.reporter.task("measure the base's AR NLL", total=len(batches)) as task:
        behind = Objective.from_config(model.config).behind
        return dict(autoregressive_nll(model, batches, rows, behind=behind, task=task).as_dict())


def _survey(run: Run, model: Any, measured: dict[str, Any]) -> Section:
    """Say what to expect of the training, and what looks wrong before it."""
    from dllm_convert.training.data.text_facts import text_statistics
    from dllm_convert.training.expectation import explain, survey

    recipe, batches = run.plan.recipe, _held_out(run, model)
    text = text_statistics(batches, run.tokenizer, filled=recipe.data.supervise_padding)
    known = {name: value for name, value in measured.items() if value is not None}
    start = survey(model, batches, known, text, seed=recipe.training.seed)
    for problem in explain(start):
        run.reporter.warn(problem)
    return asdict(start)


def _held_out(run: Run, model: Any) -> list[Any]:
    return [batch.to(model.device) for batch in run.data.held_out]


def _measure(run: Run) -> Measured:
    return Measured(nelbo_after=_nelbo(run, load(run, run.trained)))


def _views(run: Run) -> Recorded:
    """Measure what the pictures show."""
    from dllm_convert.verification.observe.logged import read_curves
    from dllm_convert.verification.observe.views import observe_run

    with run.reporter.task("measure what the pictures show"):
        seen = observe_run(
            run.weights,
            run.source.folder,
            untrained=run.untrained if run.trains else None,
            held_out=run.data.held_out if run.trains else (),
            load=partial(load, run),
            load_base=partial(_load_base, run),
            seed=run.plan.recipe.training.seed,
        )
    curves = read_curves(run.workspace.work / "metrics.jsonl") if run.trains else {}
    thinned = {name: curve.thinned() for name, curve in curves.items()}
    return Recorded(replace(seen, curves=thinned).as_dict())


def _sample(run: Run) -> Recorded:
    """Decode a few texts, and let the base write them too; keep what was seen of the first."""
    from dllm_convert.card.pictures import DENOISING
    from dllm_convert.sampling.run import record, recorder_of
    from dllm_convert.sampling.showcase import showcase

    held = [load(run, run.weights)]
    recorder = recorder_of(held[0])

    def base() -> Any | None:
        # One model at a time.
        free_memory()
        writes = run.plan.adapter.attention == "causal"
        if not writes or diffusion_section(run.plan.source.config) is not None:
            return None
        return _load_base(run, run.source.folder)

    with run.reporter.task("decode samples, and the base's own text"):
        section = showcase(held.pop(), run.tokenizer, recorder, base)
        record(recorder, run.tokenizer, run.workspace.work / DENOISING.file)
    return Recorded(section)


BASELINE = Stage("baseline", Baseline, _baseline, loads=True)
MEASURE = Stage("measure", Measured, _measure, loads=True)
VIEWS = Stage("views", Recorded, _views, loads=True)
SAMPLE = Stage("sample", Recorded, _sample, loads=True)
