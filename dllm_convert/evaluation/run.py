"""One evaluation: the conversion and its base on the same items, and what parallelism costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dllm_convert.adapters import adapter_of
from dllm_convert.common.console import Reporter
from dllm_convert.errors import IncompatibleError
from dllm_convert.evaluation.outcome import Outcome, require_harness, run_tasks
from dllm_convert.evaluation.paired import paired_difference
from dllm_convert.evaluation.request import Request
from dllm_convert.modeling.converted_config import read_converted_config


def evaluate_tasks(request: Request, reporter: Reporter) -> dict[str, Any]:
    """Evaluate a conversion, and its base on the same items.

    Args:
        request: What is to be evaluated.
        reporter: Progress.

    Returns:
        `tasks`, `results` (a line per task and metric), `effort` and, if thresholds were asked for
        and any task has text written, `sweep`.

    Raises:
        DllmConvertError: lm-eval is not installed.
        DataError: A task does not exist.
        IncompatibleError: The base is no autoregressive model.
    """
    require_harness()
    _check_base(request)
    with reporter.task("evaluate the conversion"):
        after = run_tasks(request, _conversion(request, reporter))
    before = None
    if request.base is not None:
        with reporter.task("evaluate the base"):
            before = run_tasks(request, _base(request, reporter))
    found: dict[str, Any] = {
        "tasks": {name: dict(facts) for name, facts in after.tasks.items()},
        "results": _results(before, after),
        "effort": {"after": dict(after.effort), "before": dict(before.effort) if before else None},
    }
    if request.thresholds and after.writes:
        found["sweep"] = _sweep(request, after, reporter)
    return found


def _check_base(request: Request) -> None:
    if request.base is None:
        return
    if adapter_of(read_converted_config(request.checkpoint)).attention == "bidirectional":
        raise IncompatibleError(
            f"{request.base} is a masked language model, which has no likelihood of its own and "
            "writes nothing",
            hint="Leave --against out",
        )


def _conversion(request: Request, reporter: Reporter, **more: Any) -> Any:
    from dllm_convert.evaluation.harness import DiffusionLM

    return DiffusionLM(
        str(request.checkpoint),
        batch_size=request.batch_size,
        settings=request.settings,
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


def _results(before: Outcome | None, after: Outcome) -> list[dict[str, Any]]:
    """Return a line per task and metric: both means and their paired difference."""
    rows = []
    means = before.means() if before else {}
    for (task, metric), mean in after.means().items():
        key = task, metric
        row = {"task": task, "metric": metric, "after": mean.as_dict()}
        if before is not None and key in before.items:
            row["before"] = means[key].as_dict()
            row["difference"] = paired_difference(before.items[key], after.items[key]).as_dict()
        rows.append(row)
    return rows


def _sweep(request: Request, after: Outcome, reporter: Reporter) -> list[dict[str, Any]]:
    """Run the tasks that write text at every threshold."""
    rows: list[dict[str, Any]] = []
    names = [n for n, task in after.tasks.items() if task["output_type"] == "generate_until"]
    writing = replace(request, tasks=tuple(names))
    with reporter.task("sweep thresholds", total=len(request.thresholds)) as task:
        for threshold in request.thresholds:
            model = _conversion(writing, reporter, confidence_threshold=threshold)
            outcome = run_tasks(writing, model)
            rows += [
                {
                    "threshold": threshold,
                    "task": name,
                    "metric": metric,
                    **mean.as_dict(),
                    **{
                        key: outcome.effort[key]
                        for key in ("tokens_per_forward", "tokens_per_second", "writing_seconds")
                    },
                }
                for (name, metric), mean in outcome.means().items()
            ]
            task.advance()
    return rows
