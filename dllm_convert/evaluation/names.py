"""Names of tasks: which there are, and what was meant by one that there is not.

lm-eval's own command line knows the tasks of this package, too, and says of an unknown one what
`evaluate` says.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dllm_convert.errors import UnknownTaskError
from dllm_convert.evaluation.tasks import FOLDER

_COMMIT = "get_git_commit_hash"
_MISSING = "Tasks not found: "
"""How lm-eval begins to say it."""


def unknown_tasks(names: Sequence[str], known: Collection[str]) -> UnknownTaskError:
    """Return the error for names of no task, with the nearest that there are."""
    near = {
        match: None
        for name in names
        for match in difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    }
    return UnknownTaskError(
        f"there is no task {', '.join(names)}{', nearest: ' + ', '.join(near) if near else ''}",
        hint="dllm-convert lm-eval ls tasks lists them; a folder of your own is added with "
        "--include-path (of lm-eval: --include_path)",
    )


@contextmanager
def no_repository() -> Iterator[None]:
    """Have lm-eval not ask git of which commit the folder is that somebody happens to stand in.

    Outside of a repository git says so on the terminal, as something fatal.
    """
    from lm_eval import evaluator
    from lm_eval.loggers import utils

    holders: list[Any] = [module for module in (evaluator, utils) if hasattr(module, _COMMIT)]
    before = [getattr(module, _COMMIT) for module in holders]
    for module in holders:
        setattr(module, _COMMIT, lambda: None)
    try:
        yield
    finally:
        for module, original in zip(holders, before, strict=True):
            setattr(module, _COMMIT, original)


@contextmanager
def own_tasks() -> Iterator[None]:
    """Have whatever asks lm-eval for its tasks find those of this package as well.

    Raises:
        UnknownTaskError: lm-eval found no task of a name.
    """
    from lm_eval import tasks

    original: Callable[..., Any] = tasks.TaskManager
    made: list[Any] = []

    def with_ours(*args: Any, include_path: Any = None, **more: Any) -> Any:
        given = include_path if isinstance(include_path, list | tuple) else [include_path]
        folders = [str(FOLDER), *(path for path in given if path and Path(path) != FOLDER)]
        made.append(original(*args, include_path=folders, **more))
        return made[-1]

    tasks.TaskManager = with_ours
    try:
        with no_repository():
            yield
    except ValueError as error:
        said = str(error)
        if not said.startswith(_MISSING) or not made:
            raise
        raise unknown_tasks(said.removeprefix(_MISSING).split(", "), made[-1].all_tasks) from error
    finally:
        tasks.TaskManager = original
