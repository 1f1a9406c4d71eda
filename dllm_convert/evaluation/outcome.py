"""A task run by lm-eval with one model, and what came of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dllm_convert.common.quiet import debugging
from dllm_convert.errors import DllmConvertError
from dllm_convert.evaluation.effort import Effort
from dllm_convert.evaluation.names import no_repository, unknown_tasks
from dllm_convert.evaluation.paired import Mean, mean_of
from dllm_convert.evaluation.request import Request

Items = Mapping[tuple[str, str], Mapping[int, float]]
"""Score of every item by (task, metric) and the item's number."""


@dataclass(frozen=True)
class Outcome:
    """What one model did on some tasks.

    Attributes:
        items: Scores by task, metric and item.
        effort: What it took.
        tasks: Task names and their version, number of items, examples before each and kind.
    """

    items: Items
    effort: Effort
    tasks: Mapping[str, Mapping[str, Any]]

    @property
    def writes(self) -> bool:
        """Whether any task had text written."""
        return any(task["output_type"] == "generate_until" for task in self.tasks.values())

    def means(self) -> dict[tuple[str, str], Mean]:
        """Mean of every metric with its interval."""
        return {key: mean_of(list(scores.values())) for key, scores in self.items.items()}

    def __or__(self, other: Outcome) -> Outcome:
        """Return both, of different tasks, as one."""
        return Outcome(
            {**self.items, **other.items},
            self.effort + other.effort,
            {**self.tasks, **other.tasks},
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads."""
        items = [[*key, list(scores.items())] for key, scores in self.items.items()]
        tasks = {name: dict(facts) for name, facts in self.tasks.items()}
        return {"items": items, "effort": vars(self.effort), "tasks": tasks}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Outcome:
        """Read what `as_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        items = {
            (task, metric): {int(item): float(score) for item, score in scores}
            for task, metric, scores in found["items"]
        }
        return cls(items, Effort(**found["effort"]), dict(found["tasks"]))


NOTHING = Outcome({}, Effort(), {})
"""No task."""


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


def run_task(request: Request, model: Any, manager: Any, name: str) -> Outcome:
    """Have lm-eval run a task, or a group of them, with one model.

    Args:
        request: How.
        model: As lm-eval sees it, with its `effort`.
        manager: lm-eval's, see `task_manager`.
        name: The task.
    """
    model.effort = Effort()
    found = _run(request, model, manager, name)
    return Outcome(_items(found), model.effort, _task_facts(found))


def task_manager(request: Request) -> Any:
    """Find the tasks, without lm-eval's own thousands where they are not needed.

    Raises:
        UnknownTaskError: There is no task of a name.
    """
    from lm_eval.tasks import TaskManager

    from dllm_convert.evaluation.tasks import FOLDER

    folders = [str(FOLDER), *request.include]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if all(manager.match_tasks([name]) for name in request.tasks):
        return manager
    manager = TaskManager(include_path=folders, include_defaults=True)
    unknown = [name for name in request.tasks if not manager.match_tasks([name])]
    if unknown:
        raise unknown_tasks(unknown, manager.all_tasks)
    return manager


def _run(request: Request, model: Any, manager: Any, name: str) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    seed = request.settings.seed
    with quiet_harness(), no_repository():
        found: Mapping[str, Any] = simple_evaluate(
            model=model,
            tasks=[name],
            num_fewshot=request.shots_of(name),
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


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep lm-eval's bars and notes out of ours; `HF_DEBUG=1` leaves them loud.

    The bar over a task's items cannot be turned off from outside: tqdm reads its environment when
    it is imported.
    """
    if debugging():
        yield
        return
    from lm_eval.api import task

    bar, logger = task.tqdm, logging.getLogger("lm_eval")
    level = logger.level
    task.tqdm = lambda items, **_: items
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        task.tqdm = bar
        logger.setLevel(level)


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
