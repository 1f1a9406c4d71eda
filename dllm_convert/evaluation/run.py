"""One evaluation: the conversion and its base on the same items, and what parallelism costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DllmConvertError
from dllm_convert.evaluation.base_found import check_base
from dllm_convert.evaluation.kept import KeptOutcomes
from dllm_convert.evaluation.outcome import (
    NOTHING,
    Outcome,
    quiet_harness,
    require_harness,
    run_task,
    task_manager,
)
from dllm_convert.evaluation.paired import paired_difference
from dllm_convert.evaluation.request import Request
from dllm_convert.source.hub_errors import transport_error

_FAILURES = (
    *(DllmConvertError, OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError),
    ImportError,
)
"""What tasks raise whose data cannot be had, or that are written for other models."""


def evaluate_tasks(
    request: Request, reporter: Reporter, tell: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Evaluate a conversion, and its base on the same items, task after task.

    What was found is told after every task, and kept until all is: the same call goes on after a
    stop. A task that fails leaves the others.

    Args:
        request: What is to be evaluated.
        reporter: Progress.
        tell: Given what has been found so far, as it is returned.

    Returns:
        `tasks`, `results` (a line per task and metric), `effort`; if thresholds were asked for and
        any task has text written, `sweep`; if any failed, `failed` (task to reason).

    Raises:
        DllmConvertError: lm-eval is not installed; or all that was asked for failed.
        DataError: A task or the base does not exist.
        IncompatibleError: The base is no autoregressive model.
    """
    require_harness()
    check_base(request)
    work = _Work(request, reporter, KeptOutcomes(request), task_manager(request))
    after, before, sweep = NOTHING, NOTHING, list[dict[str, Any]]()

    def found() -> dict[str, Any]:
        efforts = {"after": after.effort.as_dict()}
        base = {"before": before.effort.as_dict() if before.tasks else None}
        sections: dict[str, Any] = {
            "tasks": {name: dict(facts) for name, facts in after.tasks.items()},
            "results": _results(before, after),
            "effort": efforts | base,
        }
        sections |= {"sweep": list(sweep)} if sweep else {}
        return sections | ({"failed": dict(work.failed)} if work.failed else {})

    with reporter.task("evaluate the conversion", total=len(request.tasks)) as task:
        for outcome in work.outcomes("conversion", lambda: _conversion(request, reporter)):
            after |= outcome
            task.advance()
            tell(found())
    if request.base is not None:
        with reporter.task("evaluate the base", total=len(request.tasks)) as task:
            for outcome in work.outcomes("base", lambda: _base(request, reporter)):
                before |= outcome
                task.advance()
                tell(found())
    if request.thresholds and after.writes:
        places = list(product(request.thresholds, request.batch_sizes or (None,)))
        with reporter.task("sweep thresholds", total=len(places)) as task:
            for threshold, rows in places:
                sweep += _at_threshold(work, threshold, rows, after)
                task.advance()
                tell(found())
    if not work.failed:
        work.kept.drop()
    return found()


@dataclass
class _Work:
    """What the models of one evaluation share.

    Attributes:
        request: What is to be evaluated.
        reporter: Progress.
        kept: What was found before.
        manager: lm-eval's.
        failed: Tasks that failed, and why.
    """

    request: Request
    reporter: Reporter
    kept: KeptOutcomes
    manager: Any
    failed: dict[str, str] = field(default_factory=dict)

    def outcomes(
        self, name: str, load: Callable[[], Any], tasks: Sequence[str] = ()
    ) -> Iterator[Outcome]:
        """Yield what a model does on each task that has not failed; it is loaded if need be."""
        models: list[Any] = []

        def run(task: str) -> Outcome:
            if not models:
                with quiet_harness():
                    models.append(load())
            return run_task(self.request, models[0], self.manager, task)

        for task in tasks or self.request.tasks:
            if task in self.failed:
                continue
            try:
                yield self.kept.get(name, task, partial(run, task))
            except (*_FAILURES, transport_error()) as error:
                if len(self.request.tasks) == 1:
                    raise
                said = " ".join(str(error).split()) or type(error).__name__
                self.failed[task] = said[:300]
                self.reporter.warn(f"{task} failed ({self.failed[task]}); the others go on")


def _conversion(request: Request, reporter: Reporter, **more: Any) -> Any:
    from dllm_convert.evaluation.harness import DiffusionLM

    return DiffusionLM(
        str(request.checkpoint),
        batch_size=request.batch_size,
        settings=request.settings,
        verifier=request.verifier,
        reporter=reporter,
        **more,
    )


def _base(request: Request, reporter: Reporter) -> Any:
    from dllm_convert.evaluation.base import AutoregressiveLM
    from dllm_convert.modeling.loading import device_and_dtype

    # As the conversion is loaded.
    device, dtype = device_and_dtype()
    return AutoregressiveLM(
        pretrained=request.base,
        device=device,
        dtype=dtype,
        batch_size=request.batch_size,
        reporter=reporter,
        # A conversation is tokenised as its template wrote it, as the conversion's is.
        add_bos_token=False if request.chat else None,
    )


def _results(before: Outcome, after: Outcome) -> list[dict[str, Any]]:
    """Return a line per task and metric: both means and their paired difference."""
    rows = []
    means = before.means()
    for (task, metric), mean in after.means().items():
        key = task, metric
        row = {"task": task, "metric": metric, "after": mean.as_dict()}
        if key in before.items:
            row["before"] = means[key].as_dict()
            row["difference"] = paired_difference(before.items[key], after.items[key]).as_dict()
        rows.append(row)
    return rows


def _at_threshold(
    work: _Work, threshold: float, batch: int | None, after: Outcome
) -> list[dict[str, Any]]:
    """Run the tasks that write text at a threshold, possibly so many prompts at once."""
    names = [n for n, task in after.tasks.items() if task["output_type"] == "generate_until"]
    request = work.request if batch is None else replace(work.request, batch_size=batch)
    rows: list[dict[str, Any]] = []
    name = f"threshold {threshold}" + ("" if batch is None else f" in batches of {batch}")
    how = {"threshold": threshold} | ({} if batch is None else {"batch_size": batch})
    load = partial(_conversion, request, work.reporter, confidence_threshold=threshold)
    for outcome in replace(work, request=request).outcomes(name, load, names):
        effort = outcome.effort.as_dict()
        rows += [
            {
                **how,
                "task": task,
                "metric": metric,
                **mean.as_dict(),
                **{
                    key: effort[key]
                    for key in ("tokens_per_forward", "tokens_per_second", "writing_seconds")
                },
            }
            for (task, metric), mean in outcome.means().items()
        ]
    return rows
