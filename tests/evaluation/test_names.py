"""lm-eval's own command line knows the tasks of this package, and names the nearest of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dllm_convert.cli.app import app

tasks_of_lm_eval = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave lm-eval's own thousands of tasks out: reading them takes seconds."""
    manager = tasks_of_lm_eval.TaskManager
    monkeypatch.setattr(
        tasks_of_lm_eval,
        "TaskManager",
        lambda **given: manager(**given | {"include_defaults": False}),
    )


def lm_eval(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["lm-eval", *arguments])


@pytest.mark.parametrize("command", [[], ["run"]])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("dllm_cpoy", "no task dllm_cpoy, nearest: dllm_copy"),
        ("dllm_copy,dllm_last_wrd", "no task dllm_last_wrd, nearest: dllm_last_word"),
        ("qqqq", "no task qqqq. "),
    ],
)
def test_an_unknown_task_is_one_line_with_the_nearest(
    command: list[str], names: str, said: str
) -> None:
    result = lm_eval(*command, "--model", "dllm-convert", "--tasks", names)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_evaluate_says_the_same(source_cache: Any, tmp_path: Path) -> None:
    from conversion import convert

    convert(source_cache("llama"), tmp_path / "made", "mdlm")
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "made"), "--tasks", "dllm_cpoy"])
    assert result.exit_code == 2
    assert "no task dllm_cpoy, nearest: dllm_copy" in result.stderr


@pytest.mark.parametrize("more", [[], ["--include_path", "mine"]])
def test_own_tasks_are_found_with_and_without_an_include_path(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text("task: own_task\ndataset_path: json\n")
    monkeypatch.chdir(tmp_path)
    original = tasks_of_lm_eval.TaskManager
    result = lm_eval("ls", "tasks", *more)
    assert result.exit_code == 0, result.exception
    assert "dllm_copy" in result.stdout
    assert ("own_task" in result.stdout) == bool(more)
    assert tasks_of_lm_eval.TaskManager is original


def test_other_errors_of_lm_eval_are_its_own() -> None:
    from dllm_convert.evaluation.names import own_tasks

    with pytest.raises(ValueError, match="something else"), own_tasks():
        raise ValueError("something else")
