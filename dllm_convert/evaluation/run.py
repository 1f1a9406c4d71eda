"""One evaluation: the conversion and its base on the same items, and what parallelism costs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dllm_convert.adapters import get_adapter
from dllm_convert.console import Reporter
from dllm_convert.errors import DataError, DllmConvertError, IncompatibleError
from dllm_convert.evaluation.paired import Mean, mean_of, paired_difference
from dllm_convert.evaluation.settings import Settings, find_published
from dllm_convert.sampling.run import read_config

FORMAT_VERSION = 1
"""Version of the `evaluation` section of the manifest."""

Items = Mapping[tuple[str, str], Mapping[int, float]]
"""Score of every item by (task, metric) and the item's number."""


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        checkpoint: Folder of the conversion.
        tasks: Names of lm-eval's tasks.
        base: Folder or Hub id of the base, None to leave it out.
        include: Folders with more tasks.
        limit: Most items per task.
        batch_size: Continuations or prompts per forward.
        thresholds: Confidence thresholds to sweep; empty for the settings' own.
        chat: Whether prompts go through the chat template.
        shots: Examples before each question, None for what is published or the task's own number.
        unsafe_code: Whether tasks may run the code that a model wrote.
        published: Name of published settings, for their number of examples.
        data: Text whose held-out documents are measured, as a recipe's `data.source`.
        settings: How likelihoods are estimated and text is written.
    """

    checkpoint: Path
    tasks: tuple[str, ...]
    base: str | None = None
    include: tuple[str, ...] = ()
    limit: int | None = None
    batch_size: int = 8
    thresholds: tuple[float, ...] = ()
    chat: bool = False
    shots: int | None = None
    unsafe_code: bool = False
    published: str | None = None
    data: str | None = None
    settings: Settings = field(default_factory=Settings)

    def shots_of(self, task: str) -> int | None:
        """Examples before each question of a task, None for its own number."""
        if self.shots is not None or self.published is None:
            return self.shots
        return find_published(self.published).shots.get(task)


@dataclass(frozen=True)
class Outcome:
    """What one model did on all tasks.

    Attributes:
        items: Scores by task, metric and item.
        effort: What it took.
        seconds: Wall time, loading included.
        tasks: Task names and their version, number of items, examples before each and kind.
    """

    items: Items
    effort: Mapping[str, Any]
    seconds: float
    tasks: Mapping[str, Mapping[str, Any]]

    @property
    def writes(self) -> bool:
        """Whether any task had text written."""
        return any(task["output_type"] == "generate_until" for task in self.tasks.values())

    def means(self) -> dict[tuple[str, str], Mean]:
        """Mean of every metric with its interval."""
        return {key: mean_of(list(scores.values())) for key, scores in self.items.items()}


def require_harness() -> None:
    """Refuse to evaluate tasks without lm-eval.

    Raises:
        DllmConvertError: It is not installed.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise DllmConvertError(
            "tasks need lm-eval, which is not installed",
            hint="pip install 'dllm-convert[eval]'",
        )


def evaluate_tasks(request: Request, reporter: Reporter) -> dict[str, Any]:
    """Evaluate a conversion, and its base on the same items.

    Args:
        request: What is to be evaluated.
        reporter: Progress.

    Returns:
        The `evaluation` section of the manifest.

    Raises:
        DllmConvertError: lm-eval is not installed.
        DataError: A task does not exist or has no items.
    """
    require_harness()
    started = time.monotonic()
    with reporter.task("evaluate the conversion"):
        after = _run(request, _conversion(request))
    before = None
    if request.base is not None:
        with reporter.task("evaluate the base"):
            before = _run(request, _base(request))
    found: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tasks": {name: dict(facts) for name, facts in after.tasks.items()},
        "settings": _as_dict(request),
        "results": _results(before, after),
        "effort": {"after": dict(after.effort), "before": dict(before.effort) if before else None},
    }
    if request.thresholds and after.writes:
        found["sweep"] = _sweep(request, after, reporter)
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def _conversion(request: Request, **more: Any) -> Any:
    from dllm_convert.evaluation.harness import DiffusionLM

    return DiffusionLM(
        str(request.checkpoint), batch_size=request.batch_size, settings=request.settings, **more
    )


def _base(request: Request) -> Any:
    from dllm_convert.evaluation.base import AutoregressiveLM

    model_type = str(read_config(request.checkpoint)["model_type"])
    if get_adapter(model_type).attention == "bidirectional":
        raise IncompatibleError(
            f"{request.base} is a masked language model, which has no likelihood of its own and "
            "writes nothing",
            hint="Leave --against out",
        )
    return AutoregressiveLM(pretrained=request.base, dtype="float32", batch_size=request.batch_size)


def _as_dict(request: Request) -> dict[str, Any]:
    settings = {**vars(request.settings), "generation": dict(request.settings.generation)}
    return {
        "limit": request.limit,
        "batch_size": request.batch_size,
        "chat": request.chat,
        "shots": request.shots,
        "published": request.published,
        **settings,
    }


def _run(request: Request, model: Any) -> Outcome:
    """Have lm-eval run all tasks with one model."""
    started = time.monotonic()
    manager = _task_manager(request)
    groups: dict[int | None, list[str]] = {}
    for name in request.tasks:
        groups.setdefault(request.shots_of(name), []).append(name)
    items: dict[tuple[str, str], Mapping[int, float]] = {}
    tasks: dict[str, Mapping[str, Any]] = {}
    for shots, names in groups.items():
        found = _run_group(request, model, manager, names, shots)
        # Of several processes the first one holds the results.
        if found is not None:
            items |= _items(found)
            tasks |= _task_facts(found)
    seconds = round(time.monotonic() - started, 1)
    return Outcome(items, model.effort.as_dict(), seconds, tasks)


def _task_manager(request: Request) -> Any:
    """Find the tasks, without lm-eval's own thousands where they are not needed.

    Raises:
        DataError: There is no task of a name.
    """
    from lm_eval.tasks import TaskManager

    from dllm_convert.evaluation.tasks import FOLDER

    folders = [str(FOLDER), *request.include]
    unknown: list[str] = []
    for defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=defaults)
        unknown = [name for name in request.tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise DataError(
        f"there is no task {', '.join(unknown)}",
        hint="dllm-convert lm-eval ls tasks lists them; --include-path adds a folder of your own",
    )


def _run_group(
    request: Request, model: Any, manager: Any, names: list[str], shots: int | None
) -> Mapping[str, Any] | None:
    from lm_eval import simple_evaluate

    seed = request.settings.seed
    found: Mapping[str, Any] | None = simple_evaluate(
        model=model,
        tasks=names,
        num_fewshot=shots,
        limit=request.limit,
        apply_chat_template=request.chat,
        fewshot_as_multiturn=request.chat,
        confirm_run_unsafe_code=request.unsafe_code,
        task_manager=manager,
        bootstrap_iters=0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return found


def _items(found: Mapping[str, Any]) -> Items:
    """Collect the numbers that lm-eval scored every item with."""
    items: dict[tuple[str, str], dict[int, float]] = {}
    for task, samples in found["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, int | float):
                    items.setdefault((task, metric), {})[sample["doc_id"]] = float(value)
    return items


def _task_facts(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        task: {
            "version": found["versions"].get(task),
            "items": found["n-samples"][task]["effective"],
            "shots": found["n-shot"].get(task),
            "output_type": config.get("output_type"),
        }
        for task, config in found["configs"].items()
    }


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
            outcome = _run(writing, _conversion(writing, confidence_threshold=threshold))
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
